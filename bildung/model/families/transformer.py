"""The Transformer of 2017, as in the paper (Vaswani et al., arXiv 1706.03762).

    section 3.1   post-norm: LayerNorm(x + Sublayer(x)), and no norm at the end of a stack
            3.2   scores divided by sqrt(d_k); the four projections of attention have no biases
            3.3   feed-forward max(0, x W1 + b1) W2 + b2
            3.4   one matrix for source, target and pre-softmax; as an embedding multiplied by sqrt(d_model)
            3.5   sinusoids, sines and cosines in turn
            5.4   dropout on what each sublayer adds and on embeddings + positions; none on attention weights

What the paper leaves open is taken from its code: LayerNorm's eps 1e-6, embeddings N(0, 1/d_model). The matrices start
as Xavier's, as most later code does it.

No other library knows this `model_type`, so this is its documentation. config.json: vocab_size, hidden_size (d_model),
intermediate_size (d_ff), encoder_layers, decoder_layers (N), num_attention_heads (h), dropout (P_drop),
layer_norm_eps, max_position_embeddings (the longest target that decoding is asked for; the sinusoids know no end),
tie_word_embeddings (false: a pre-softmax matrix of its own), and bos_, eos_, pad_ and decoder_start_token_id (default:
BOS, or EOS without one). The defaults are the paper's base model. Tensors have the module paths of this code: shared,
encoder.layers.N.self_attn.{q,k,v,o}_proj, .mlp.{up,down}_proj, .input_layernorm (after self-attention),
.cross_layernorm, .post_attention_layernorm (after the feed-forward); decoder.layers.N likewise with .cross_attn.
"""

from __future__ import annotations

import math
from dataclasses import replace

from bildung.core.errors import ConfigError
from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys, per_head

ARCHITECTURE = "Transformer"


def config(keys: ConfigKeys) -> ModelConfig:
    """The base model where nothing else is said."""
    hidden_size, heads = keys.size("hidden_size", 512), keys.size("num_attention_heads", 8)
    dropout = keys.number("dropout", 0.1)
    special = keys.special_tokens()
    start = [*keys.token_ids("decoder_start_token_id"), special["bos_token_id"], *special["eos_token_ids"]]
    start = [token for token in start if token is not None]
    if not start or not special["eos_token_ids"]:
        raise ConfigError(
            "config.json: a Transformer needs eos_token_id, which ends a target, and decoder_start_token_id (or "
            "bos_token_id), from which it is decoded; train the tokenizer with such tokens."
        )
    decoder = ModelConfig(
        model_type="transformer",
        kind="encoder-decoder",
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.size("intermediate_size", 2048),
        num_hidden_layers=keys.size("decoder_layers", 6),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=per_head(hidden_size, heads),
        max_position_embeddings=keys.size("max_position_embeddings", 1024),
        norm="layer",
        norm_eps=keys.number("layer_norm_eps", 1e-6),
        norm_placement="post",
        final_norm=False,
        hidden_act="relu",
        gated=False,
        positions="sinusoidal",
        cross=True,
        mlp_bias=True,
        embed_scale=math.sqrt(hidden_size),
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
        embed_dropout=dropout,
        residual_dropout=dropout,
        init="xavier",
        **special,
        decoder_start_token_id=start[0],
    )
    layers = keys.size("encoder_layers", 6)
    return replace(decoder, encoder=replace(decoder, causal=False, cross=False, num_hidden_layers=layers, windows=()))

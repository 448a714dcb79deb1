"""T5: an encoder-decoder without position vectors; a learned bias on the scores of each head says how far apart two
tokens are (Raffel et al. 2020, arXiv 1910.10683, section 2.1).

    1.0   ReLU; the unembedding is the embedding, and states are divided by sqrt(D) before it (embeddings are N(0, 1))
    1.1   GELU gated (Shazeer 2020); an unembedding of its own, nothing divided

Scores are not divided by sqrt(head_dim): the queries' starting weights are that much smaller. Only the first block of
each stack holds a relative bias; the others use it too. Cross-attention has none.

transformers 5 writes `tie_word_embeddings: true` whatever the model is, and `scale_decoder_outputs` for the division;
whether there is an unembedding of its own is then told by the file (see `present`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import ConfigError
from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys
from bildung.model.names import Names

ARCHITECTURE = "T5ForConditionalGeneration"
REPEATED = (
    "lm_head.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    # In the first files, and used by nobody: the bias of a cross-attention.
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def config(keys: ConfigKeys) -> ModelConfig:
    """T5 has its own words: d_model, d_kv (free of d_model / heads), d_ff, num_layers, num_decoder_layers."""
    hidden_size, heads, layers = keys.size("d_model", 512), keys.size("num_heads", 8), keys.size("num_layers", 6)
    gated, act = _feed_forward(keys)
    tied = keys.flag("tie_word_embeddings", True)
    dropout = keys.number("dropout_rate", 0.1)
    keys.require("is_encoder_decoder", True)
    keys.require("is_decoder", False)
    keys.number("classifier_dropout", 0.0)  # of a head that is not built here
    special, start = keys.special_tokens(), keys.token_ids("decoder_start_token_id")
    pad = 0 if special["pad_token_id"] is None else special["pad_token_id"]
    decoder = ModelConfig(
        model_type="t5",
        kind="encoder-decoder",
        vocab_size=keys.size("vocab_size", 32128),
        hidden_size=hidden_size,
        intermediate_size=keys.size("d_ff", 2048),
        num_hidden_layers=keys.size("num_decoder_layers", layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=keys.size("d_kv", 64),
        max_position_embeddings=keys.size("n_positions", 512),  # what it was trained on; the bias reaches further
        norm="rms",
        norm_eps=keys.number("layer_norm_epsilon", 1e-6),
        hidden_act=act,
        gated=gated,
        positions="t5",
        relative_buckets=keys.size("relative_attention_num_buckets", 32),
        relative_max_distance=keys.size("relative_attention_max_distance", 128),
        cross=True,
        attention_scale=1.0,
        logit_scale=hidden_size**-0.5 if keys.flag("scale_decoder_outputs", tied) else 1.0,
        tie_word_embeddings=tied,
        embed_dropout=dropout,
        attention_dropout=dropout,
        residual_dropout=dropout,
        activation_dropout=dropout,
        final_dropout=dropout,
        init="t5",
        initializer_range=keys.number("initializer_factor", 1.0),
        bos_token_id=special["bos_token_id"],
        eos_token_ids=special["eos_token_ids"] or (1,),
        pad_token_id=pad,
        decoder_start_token_id=start[0] if start else pad,
    )
    if decoder.relative_buckets % 4 or decoder.relative_max_distance <= decoder.relative_buckets // 2:
        raise ConfigError(
            f"config.json: {decoder.relative_buckets} relative buckets up to a distance of "
            f"{decoder.relative_max_distance}; a multiple of 4 is needed, and a distance of more than half of them."
        )
    return replace(decoder, encoder=replace(decoder, causal=False, cross=False, num_hidden_layers=layers, windows=()))


def _feed_forward(keys: ConfigKeys) -> tuple[bool, str]:
    """(gated, activation) of "relu", "gated-gelu", "gated-silu" ...; "gated-gelu" means the tanh form."""
    given = keys.take("feed_forward_proj", "relu")
    kind, _, act = str(given).rpartition("-")
    if kind not in ("", "gated"):
        raise ConfigError(f"config.json: feed_forward_proj = {given!r}; an activation or gated-ACTIVATION is expected.")
    act = "gelu_new" if given == "gated-gelu" else act
    # The same said again by transformers.
    keys.require("is_gated_act", kind == "gated")
    keys.require("dense_act_fn", act)
    return kind == "gated", act


def present(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """An unembedding in the file that is not the embedding is the model's own, whatever config.json says of tying."""
    head, shared = tensors.get("lm_head.weight"), tensors.get("shared.weight")
    if head is None or shared is None or (head.shape == shared.shape and torch.equal(head, shared.to(head.dtype))):
        return {}
    return {"tie_word_embeddings": False}


def names(config: ModelConfig) -> Names:
    """Each block is a list of layers: attention, in the decoder cross-attention, feed-forward."""
    found: dict[str, str] = {}
    for stack in ("encoder", "decoder"):
        own, file = f"{stack}.layers.*", f"{stack}.block.*.layer"
        parts = [("self_attn", "input_layernorm", "SelfAttention")]
        if stack == "decoder":
            parts.append(("cross_attn", "cross_layernorm", "EncDecAttention"))
        for index, (module, norm, name) in enumerate(parts):
            found |= {f"{own}.{module}.{letter}_proj": f"{file}.{index}.{name}.{letter}" for letter in "qkvo"}
            found[f"{own}.{norm}"] = f"{file}.{index}.layer_norm"
        last = f"{file}.{len(parts)}"
        found[f"{own}.post_attention_layernorm"] = f"{last}.layer_norm"
        matrices = {"up_proj": "wi", "down_proj": "wo"}
        if config.gated:
            matrices = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}
        found |= {f"{own}.mlp.{module}": f"{last}.DenseReluDense.{name}" for module, name in matrices.items()}
        found[f"{stack}.norm"] = f"{stack}.final_layer_norm"
        found[f"{stack}.bias"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
    return found

"""GPT-2: learned positions, LayerNorm before each sublayer, GELU (tanh form), biases everywhere (Radford et al. 2019).

Its files keep q, k and v in one matrix and store every matrix as [in, out] (TensorFlow's order, "Conv1D"). The first
ones, the published checkpoints among them, lack the `transformer.` before each name; they are read too.
"""

from __future__ import annotations

from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys, per_head
from bildung.model.names import Names, Stored

ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."
REPEATED = ("lm_head.weight", "*.attn.bias", "*.attn.masked_bias")  # the tied matrix; the causal mask as a buffer


def config(keys: ConfigKeys) -> ModelConfig:
    """GPT-2 has its own words: n_embd, n_layer, n_head, n_positions, n_inner."""
    hidden_size, heads = keys.size("n_embd", 768), keys.size("n_head", 12)
    keys.require("n_ctx", keys.raw.get("n_positions", 1024))  # the same number twice, in old files
    keys.require("n_special", 0)  # rows of the embedding beyond the vocabulary, in the first files
    keys.take("predict_special_tokens", None)  # whether the loss of the first code counted those rows
    keys.require("scale_attn_weights", True)
    keys.require("scale_attn_by_inverse_layer_idx", False)
    keys.require("reorder_and_upcast_attn", False)
    keys.require("add_cross_attention", False)
    keys.require("is_encoder_decoder", False)
    for name in ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"):
        keys.take(name, None)  # heads for multiple choice, which are not built here
    keys.take("summary_first_dropout", None)
    return ModelConfig(
        model_type="gpt2",
        vocab_size=keys.size("vocab_size", 50257),
        hidden_size=hidden_size,
        intermediate_size=keys.size("n_inner", 4 * hidden_size),
        num_hidden_layers=keys.size("n_layer", 12),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=per_head(hidden_size, heads),
        max_position_embeddings=keys.size("n_positions", 1024),
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        hidden_act=keys.take("activation_function", "gelu_new"),
        gated=False,
        positions="learned",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
        embed_dropout=keys.number("embd_pdrop", 0.1),
        attention_dropout=keys.number("attn_pdrop", 0.1),
        residual_dropout=keys.number("resid_pdrop", 0.1),
        initializer_range=keys.number("initializer_range", 0.02),
        init="gpt2",
        **keys.special_tokens(),
    )


def names(config: ModelConfig) -> Names:
    """One fused, transposed matrix for q, k and v; all others transposed too."""
    block, own = "transformer.h.*", "model.layers.*"
    fused = {
        f"{own}.self_attn.{name}": Stored(f"{block}.attn.c_attn", part, 3, transposed=True)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj"))
    }
    return {
        "model.embed_tokens": "transformer.wte",
        "model.embed_positions": "transformer.wpe",
        f"{own}.input_layernorm": f"{block}.ln_1",
        **fused,
        f"{own}.self_attn.o_proj": Stored(f"{block}.attn.c_proj", transposed=True),
        f"{own}.post_attention_layernorm": f"{block}.ln_2",
        f"{own}.mlp.up_proj": Stored(f"{block}.mlp.c_fc", transposed=True),
        f"{own}.mlp.down_proj": Stored(f"{block}.mlp.c_proj", transposed=True),
        "model.norm": "transformer.ln_f",
    }

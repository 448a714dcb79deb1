"""Llama 1, 2, 3.x and SmolLM2: RMSNorm before each sublayer, RoPE, grouped-query attention, SiLU gated feed-forward.

Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), Grattafiori et al. 2024 (arXiv 2407.21783).
The tensor names are Hugging Face's and equal the module paths here, so there is no name map.
"""

from __future__ import annotations

from typing import Any

from bildung.core.errors import ConfigError
from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys, per_head
from bildung.model.rope_keys import rope_from

ARCHITECTURE = "LlamaForCausalLM"
KINDS = ("sliding_attention", "full_attention")  # transformers' words for layers with a window and without


def decoder_keys(keys: ConfigKeys) -> dict[str, Any]:
    """The keys that Llama, Mistral, Qwen2 and Qwen3 share."""
    heads = keys.size("num_attention_heads")
    hidden_size = keys.size("hidden_size")
    keys.require("is_encoder_decoder", False)
    keys.require("partial_rotary_factor", 1.0)
    return {
        "model_type": keys.raw["model_type"],
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("intermediate_size"),
        "num_hidden_layers": keys.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("num_key_value_heads", heads),
        "head_dim": keys.size("head_dim", None) or per_head(hidden_size, heads),
        "max_position_embeddings": keys.size("max_position_embeddings"),
        "norm_eps": float(keys.number("rms_norm_eps", 1e-6)),
        "hidden_act": keys.require("hidden_act", "silu"),
        "attention_dropout": float(keys.number("attention_dropout", 0.0)),
        "rope": rope_from(keys),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", False),
        "initializer_range": float(keys.number("initializer_range", 0.02)),
        **keys.special_tokens(),
    }


def layer_kinds(keys: ConfigKeys, default: list[str]) -> list[str]:
    """`layer_types`, one of KINDS for each layer, where a file says them."""
    kinds: Any = keys.take("layer_types", default)
    if not isinstance(kinds, list) or len(kinds) != len(default) or any(kind not in KINDS for kind in kinds):
        raise ConfigError(
            f"config.json: layer_types = {str(kinds)[:80]}; one of {', '.join(KINDS)} is needed for each of the "
            f"{len(default)} layers."
        )
    return kinds


def config(keys: ConfigKeys) -> ModelConfig:
    """Llama: one `attention_bias` for q, k, v and o; `mlp_bias` for the feed-forward."""
    keys.require("pretraining_tp", 1)  # >1 splits matmuls to mimic tensor parallelism: other rounding, same model
    keys.require("rope_interleaved", False)
    keys.take("max_sequence_length", None)  # of LLaMA 1's files: max_position_embeddings again
    bias = keys.flag("attention_bias", False)
    mlp_bias = keys.flag("mlp_bias", False)
    return ModelConfig(**decoder_keys(keys), qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)

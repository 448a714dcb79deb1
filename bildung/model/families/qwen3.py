"""Qwen3 (dense): Qwen2 with an RMSNorm on every query and key head instead of biases (arXiv 2505.09388)."""

from __future__ import annotations

from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys
from bildung.model.families.llama import decoder_keys
from bildung.model.families.qwen2 import qwen_windows

ARCHITECTURE = "Qwen3ForCausalLM"


def config(keys: ConfigKeys) -> ModelConfig:
    """`head_dim` is free (128 by default), not hidden_size / heads."""
    keys.left.setdefault("head_dim", 128)
    shared = decoder_keys(keys)
    bias = keys.flag("attention_bias", False)
    windows = qwen_windows(keys, shared["num_hidden_layers"])
    return ModelConfig(**shared, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=windows)

"""Mistral: Llama with a sliding attention window in every layer (Jiang et al. 2023, arXiv 2310.06825)."""

from __future__ import annotations

from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys
from bildung.model.families.llama import decoder_keys

ARCHITECTURE = "MistralForCausalLM"


def config(keys: ConfigKeys) -> ModelConfig:
    """`sliding_window` null means full attention (Mistral 7B v0.2 and later)."""
    shared = decoder_keys(keys)
    window = keys.size("sliding_window", None)
    return ModelConfig(**shared, windows=(window,) * shared["num_hidden_layers"])

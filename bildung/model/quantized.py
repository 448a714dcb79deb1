"""The quantization methods by name, and the words by which config.json tells others how the weights are stored.

Int8 is written as compressed-tensors `pack-quantized` (transformers, vLLM), NF4 as bitsandbytes (transformers, vLLM).
Of families whose files fuse or transpose matrices the quantized form is our own (see store.state_tensors).
"""

from __future__ import annotations

from typing import Any

import torch

from bildung.core.errors import ConfigError
from bildung.model.int8 import Int8
from bildung.model.nf4 import Nf4
from bildung.model.quantized_store import DTYPE_NAMES

__all__ = ["METHODS", "Int8", "Nf4", "describe", "describe_own", "method_of"]

METHODS: dict[str, type[Int8] | type[Nf4]] = {"int8": Int8, "nf4": Nf4}

# What a quantization_config must say (besides what does not matter) for its tensors to be what these stores hold.
NF4_WORDS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
INT8_WORDS = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
OWN_WORDS = {"quant_method": "bildung"}
INT8_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def method_of(raw_config: dict[str, Any]) -> str | None:
    """The name in METHODS, or None when not quantized, by config.json's `quantization_config`. Else a ConfigError."""
    given = raw_config.get("quantization_config")
    if given is None:
        return None
    if _says(given, OWN_WORDS) and given.get("format") in METHODS:
        return str(given["format"])
    if _says(given, NF4_WORDS):
        return "nf4"
    groups = given.get("config_groups") if _says(given, INT8_WORDS) else None
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if groups and all(_says(group, {}) and _says(group.get("weights"), INT8_WEIGHTS) for group in groups):
        return "int8"
    raise ConfigError(
        f"config.json: quantization_config {str(given)[:200]} is not read here; readable: bitsandbytes NF4 with double "
        f"quantization, and compressed-tensors pack-quantized with 8-bit symmetric channels."
    )


def _says(given: Any, words: dict[str, Any]) -> bool:
    return isinstance(given, dict) and all(given.get(key) == value for key, value in words.items())


def describe_own(method: str, kept: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a directory that only this library reads. `kept`: matrices left dense."""
    return {**OWN_WORDS, "format": method, "ignore": kept}


def describe(method: str, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` by which transformers recognises the stored format. `kept`: matrices left dense."""
    if method == "nf4":
        return {
            **NF4_WORDS,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": DTYPE_NAMES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept,
        }
    return {
        **INT8_WORDS,
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**INT8_WEIGHTS, "dynamic": False}}},
    }

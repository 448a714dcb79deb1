"""The quantization methods by name, and the words by which config.json tells others how the weights are stored.

Int8 is written as compressed-tensors `pack-quantized` (transformers, vLLM), NF4 as bitsandbytes (transformers, vLLM).
"""

from __future__ import annotations

from typing import Any

import torch

from bildung.core.errors import ConfigError
from bildung.model.int8 import Int8
from bildung.model.nf4 import Nf4
from bildung.model.quantized_store import DTYPE_NAMES

__all__ = ["METHODS", "Int8", "Nf4", "describe", "method_of"]

METHODS: dict[str, type[Int8] | type[Nf4]] = {"int8": Int8, "nf4": Nf4}


def method_of(raw_config: dict[str, Any]) -> str | None:
    """The name in METHODS, or None when not quantized, by config.json's `quantization_config`. Else a ConfigError."""
    given = raw_config.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else None
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    if method == "bitsandbytes" and nf4.items() <= given.items():
        return "nf4"
    if method == "compressed-tensors" and given.get("format") == "pack-quantized":
        weights = [group.get("weights") or {} for group in (given.get("config_groups") or {}).values()]
        if all(w.get("num_bits") == 8 and w.get("symmetric") and w.get("strategy") == "channel" for w in weights):
            return "int8"
    raise ConfigError(
        f"config.json: quantization_config {str(given)[:200]} is not read here; readable: bitsandbytes NF4 with double "
        f"quantization, and compressed-tensors pack-quantized with 8-bit symmetric channels."
    )


def describe(method: str, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` by which transformers recognises the stored format. `kept`: matrices left dense."""
    if method == "nf4":
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": DTYPE_NAMES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept,
        }
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }

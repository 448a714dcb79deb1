"""Qwen2 and Qwen2.5: Llama with biases on q, k, v (none on o) and, rarely, sliding windows (arXiv 2407.10671)."""

from __future__ import annotations

from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys
from bildung.model.families.llama import KINDS, decoder_keys, layer_kinds

ARCHITECTURE = "Qwen2ForCausalLM"


def qwen_windows(keys: ConfigKeys, num_hidden_layers: int) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide when `use_sliding_window` says so; `layer_types` overrules both."""
    window = keys.size("sliding_window", None)
    if not keys.flag("use_sliding_window", False):
        window = None  # Qwen checkpoints carry a sliding_window that is switched off
    first = keys.number("max_window_layers", 28)
    kinds = [KINDS[0] if window is not None and i >= first else KINDS[1] for i in range(num_hidden_layers)]
    kinds = layer_kinds(keys, kinds)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def config(keys: ConfigKeys) -> ModelConfig:
    """The q, k, v biases are part of the architecture and have no key."""
    keys.require("use_mrope", False)  # positions in three dimensions, of the models that see images
    shared = decoder_keys(keys)
    return ModelConfig(**shared, qkv_bias=True, windows=qwen_windows(keys, shared["num_hidden_layers"]))

"""Qwen2 and Qwen2.5: Llama with biases on q, k, v (none on o) and, rarely, sliding windows (arXiv 2407.10671)."""

from __future__ import annotations

from bildung.core.errors import ConfigError
from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys
from bildung.model.families.llama import decoder_keys

ARCHITECTURE = "Qwen2ForCausalLM"


def qwen_windows(keys: ConfigKeys, num_hidden_layers: int) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide when `use_sliding_window` says so; `layer_types` overrules both."""
    window = keys.size("sliding_window", None)
    if not keys.flag("use_sliding_window", False):
        window = None  # Qwen checkpoints carry a sliding_window that is switched off
    first = keys.take("max_window_layers", 28)
    kinds = keys.take("layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_hidden_layers)]
        kinds = kinds if window is not None else ["full_attention"] * num_hidden_layers
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ConfigError(f"config.json: layer_types {sorted(unknown)}; allowed: sliding_attention, full_attention.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def config(keys: ConfigKeys) -> ModelConfig:
    """The q, k, v biases are part of the architecture and have no key."""
    shared = decoder_keys(keys)
    return ModelConfig(**shared, qkv_bias=True, windows=qwen_windows(keys, shared["num_hidden_layers"]))

"""RoPE settings out of a config.json, in both forms that transformers has written."""

from __future__ import annotations

from typing import Any

from bildung.core.errors import ConfigError
from bildung.model.config import Rope
from bildung.model.config_keys import ConfigKeys, is_number


def rope_from(keys: ConfigKeys) -> Rope:
    """RoPE settings from either form: transformers 5 `rope_parameters`, or `rope_theta` + `rope_scaling` before it."""
    theta = keys.number("rope_theta", 10000.0)
    new, old = keys.take("rope_parameters", {}), keys.take("rope_scaling", {})
    if not isinstance(given := new or old, dict):
        raise ConfigError(f"config.json: RoPE settings {str(given)[:80]!r} are not a JSON object.")
    given = dict(given)
    theta = given.pop("rope_theta", theta)
    if not is_number(theta) or theta <= 0:
        raise ConfigError(f"config.json: rope_theta = {theta!r}; it must be a positive number.")
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise ConfigError(f"config.json: RoPE scaling {kind!r} is not supported; allowed: {', '.join(ROPE_KINDS)}.")
    needed, optional = ROPE_KINDS[kind]
    rope: dict[str, Any] = {"kind": kind}
    if "original_max_position_embeddings" in (*needed, *optional):
        rope["original_max_position_embeddings"] = keys.raw.get("max_position_embeddings")
    for name in (*needed, *optional):
        value = given.pop(name, None)
        if value is None and name in optional:
            continue
        if not is_number(value) or value <= 0:
            raise ConfigError(f"config.json: RoPE scaling {kind!r} needs a positive {name}; it is {value!r}.")
        rope[name] = value
    context = keys.raw.get("max_position_embeddings")
    if kind == "dynamic" and context is not None and rope["original_max_position_embeddings"] != context:
        raise ConfigError(
            f"config.json: RoPE scaling 'dynamic' with original_max_position_embeddings = "
            f"{rope['original_max_position_embeddings']}, and max_position_embeddings = {context}: transformers "
            f"counts from the second whatever the first says. Give one number."
        )
    given = {k: v for k, v in given.items() if v is not None and not (k == "factor" and v == 1.0)}
    if given:
        raise ConfigError(f"config.json: RoPE scaling {kind!r} does not know {', '.join(sorted(given))}.")
    return Rope(theta=float(theta), **rope)


# Kind of RoPE scaling -> the numbers it needs, and those it may have (the original context is the config's otherwise).
ROPE_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "ntk": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor",), ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")),
}

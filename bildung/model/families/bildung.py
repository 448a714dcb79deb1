"""Models of free composition, born here: every choice of ModelConfig is a key of config.json, under its own name.

    {"model_type": "bildung", "vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
     "positions": "alibi", "norm": "layer", "norm_placement": "pre", "hidden_act": "gelu", "gated": false}

    needed        vocab_size hidden_size num_hidden_layers num_attention_heads
    sizes         intermediate_size (4 · hidden_size)  num_key_value_heads (as many as heads)  head_dim (hidden_size /
                  heads)  max_position_embeddings (2048)
    kind          decoder (causal), or encoder with `heads` from heads.py, `token_types` and `num_labels`
    positions     integer sinusoidal sinusoidal_halves learned rope alibi t5 none; see positions.py. With rope: `rope`
                  and `local_rope` {theta, kind, factor ...} (class Rope), `rotary_dim`
    norms         norm: rms layer batch; norm_eps (1e-5); norm_placement: pre post sandwich; embed_norm final_norm
                  layer_scale; parallel_residual; norm_offset (0), added to the norms' weights
    feed-forward  hidden_act (layers.ACTIVATIONS), gated; mlp: false for attention alone
    attention     causal, windows (one per layer, null = all), qk_norm, attention_sinks, attention_scale and the caps;
                  prefix_lm: text source, a prompt seen in both directions (see model/prefix_lm.py)
    the rest      biases, dropouts, tie_word_embeddings, init, factors: as commented in model/config.py

Only this library reads such a directory: others say that they do not know the model_type, and touch nothing.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bildung.core.errors import ConfigError, nearest
from bildung.model.config import BaseConfig, ModelConfig, Rope
from bildung.model.config_keys import ConfigKeys, per_head

# Fields that belong to other kinds of model, or are written under Hugging Face's word.
ELSEWHERE = set(
    "raw model_type bos_token_id eos_token_ids pad_token_id image encoder cross decoder_start_token_id logits_bias "
    "position_offset transform_act".split()
)
CHOICES = [field.name for field in fields(ModelConfig) if field.name not in ELSEWHERE]
# A choice that would do nothing without another one: (the choice, whether it would do nothing, why).
IDLE = (
    ("parallel_residual", lambda config: config.norm_placement == "post", "post-norm blocks have one stream to add to"),
    ("layer_scale", lambda config: config.norm_placement == "post", "it scales what pre-norm sublayers add"),
    ("parallel_residual", lambda config: not config.mlp, "there is no feed-forward layer beside attention"),
    ("gated", lambda config: not config.mlp, "there is no feed-forward layer"),
    ("hidden_act", lambda config: not config.mlp and config.kind == "decoder", "there is no feed-forward layer"),
    ("mlp_bias", lambda config: not config.mlp, "there is no feed-forward layer"),
    ("activation_dropout", lambda config: not config.mlp, "there is no feed-forward layer"),
    ("rotary_dim", lambda config: config.positions != "rope", "nothing is rotated without RoPE"),
    ("local_rope", lambda config: config.positions != "rope", "nothing is rotated without RoPE"),
    ("rope", lambda config: config.positions != "rope", "nothing is rotated without RoPE"),
    ("local_rope", lambda config: not any(config.windows), "no layer has a window"),
    ("relative_buckets", lambda config: config.positions != "t5", "they are T5's"),
    ("relative_max_distance", lambda config: config.positions != "t5", "it is T5's"),
    ("prefix_lm", lambda config: config.kind == "encoder" or not config.causal, "all tokens see all others already"),
    ("heads", lambda config: config.kind == "decoder", "a decoder has its unembedding alone"),
    ("token_types", lambda config: config.kind == "decoder", "all tokens of a decoder are of one segment"),
    ("head_bias", lambda config: config.kind == "encoder", "the masked-language head always has one"),
    ("num_labels", lambda config: not _labels(config), "no head tells classes apart"),
    ("classifier_dropout", lambda config: not _labels(config), "no head tells classes apart"),
)
HEADS = ("pooler", "mlm", "nsp", "classify", "classify_tanh", "classify_relu", "tag")  # of an encoder: see heads.py


def ARCHITECTURE(config: BaseConfig) -> str:
    """What `architectures` says, for people: no other program has these classes."""
    return "BildungDecoder" if config.kind == "decoder" else "BildungEncoder"


def config(keys: ConfigKeys) -> ModelConfig:
    """Every choice is checked by its declared type. Raises ConfigError for one that is wrong or would do nothing."""
    hidden_size, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    given = {
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden_size,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,
        "causal": keys.raw.get("kind", "decoder") == "decoder",
    }
    for name in CHOICES:
        value = keys.take(name, given.get(name))
        if value is not None:
            given[name] = value
    if "head_dim" not in given:
        given["head_dim"] = per_head(hidden_size, heads)
    if given.get("mlp") is False and "intermediate_size" in keys.raw:
        raise ConfigError("config.json: intermediate_size would do nothing: there is no feed-forward layer (mlp).")
    for name in ("rope", "local_rope"):
        _check_names(name, given.get(name, {}))
        if isinstance(given.get(name), dict):  # what is stretched, where not said: the context of this model
            given[name] = {"original_max_position_embeddings": given["max_position_embeddings"], **given[name]}
    if given.get("kind", "decoder") not in ("decoder", "encoder"):
        raise ConfigError(f"config.json: kind = {given['kind']!r}; allowed: 'decoder', 'encoder'.")
    special = keys.special_tokens()
    try:
        made = TypeAdapter(ModelConfig).validate_json(
            json.dumps({"model_type": "bildung", **given, **special}), strict=True
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if isinstance(cause := problem.get("ctx", {}).get("error"), ConfigError):  # of ModelConfig's own checks
            raise cause from None
        name, message, value = ".".join(map(str, problem["loc"])), problem["msg"], str(problem["input"])[:80]
        raise ConfigError(f"config.json: {name} = {value!r}; {message[:1].lower()}{message[1:]}.") from None
    _check_values(made, given)
    return made


def _labels(config: ModelConfig) -> list[str]:
    """The heads that tell classes apart."""
    return [head for head in config.heads if head == "tag" or head.startswith("classify")]


def _check_values(made: ModelConfig, given: dict[str, Any]) -> None:
    for name, is_idle, reason in IDLE:
        if given.get(name) and is_idle(made):
            raise ConfigError(f"config.json: {name} = {given[name]!r} would do nothing: {reason}; leave it out.")
    if unknown := [head for head in made.heads if head not in HEADS]:
        hint = nearest(unknown[0], HEADS)
        raise ConfigError(f"config.json: heads has {unknown[0]!r}; known: {', '.join(HEADS)}. {hint}".strip())
    if len([head for head in made.heads if head.startswith("classify")]) > 1:
        raise ConfigError(f"config.json: heads = {list(made.heads)}; a sentence is classified by one of them.")
    if _labels(made) and made.num_labels < 1:
        raise ConfigError(f"config.json: the head {_labels(made)[0]!r} needs num_labels, the number of its classes.")
    if made.token_types < 0:
        raise ConfigError(f"config.json: token_types = {made.token_types}; it must not be negative.")
    for name in ("attention_scale", "attention_softcap", "logit_softcap", "embed_scale", "logit_scale"):
        if (value := getattr(made, name)) is not None and value <= 0:
            raise ConfigError(f"config.json: {name} = {value}; it must be positive.")
    if any(window is not None and window < 1 for window in made.windows):
        raise ConfigError(
            f"config.json: windows = {list(made.windows)}; a token sees itself at least: from 1, or null."
        )
    if made.relative_buckets < 4 or made.relative_max_distance <= made.relative_buckets // 2:
        raise ConfigError("config.json: relative_buckets is at least 4, relative_max_distance more than half of it.")


def _check_names(name: str, value: Any) -> None:
    known = [field.name for field in fields(Rope)]
    if isinstance(value, dict) and (unknown := sorted(set(value) - set(known))):
        hint = nearest(unknown[0], known)
        raise ConfigError(f"config.json: {name} has no {unknown[0]!r}; it has {', '.join(known)}. {hint}".strip())

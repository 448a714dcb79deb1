"""Prefix language models: decoders that read a prompt in both directions and write the answer from left to right.

               prompt   answer                causal: * sees what is before it;  a prefix adds the o
    prompt     * o o    . .
               * * o    . .
               * * *    . .
    answer     * * *    * .                   Raffel et al. 2020 (arXiv 1910.10683), section 3.2.1 and figure 4
               * * *    * *

The weights are those of any decoder; how the prompt is to be read is not in them. So config.json says it, in the key
`prefix_lm` of model_type `bildung`, which other programs do not know and refuse. As a `llama` they would take it, read
the prompt from left to right, and write something else without a word.

    "prefix_lm": "text"      the prompt is the beginning of a text
    "prefix_lm": "source"    the prompt is a source with what stands around it (data/seq2seq.py): its answer is a target

Prompts are the prefix where text is written (run/loop.py, run/beam.py), what comes before the first target where it is
scored or learned (train/objectives.py, evaluate/likelihood.py). Whoever calls the model without `prefix_BL` reads from
left to right: lenses, pictures of attention.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any, Literal

from bildung.core.errors import ConfigError
from bildung.model.base import Model
from bildung.model.config import BaseConfig, ModelConfig, from_dict
from bildung.model.families.bildung import CHOICES

PrefixKind = Literal["text", "source"]
SPECIAL = ("bos_token_id", "pad_token_id")


def make_prefix_lm(model: Model, kind: PrefixKind) -> None:
    """Have a decoder read prompts in both directions, and its directory say so. Raises as `as_prefix_lm`."""
    model.config = as_prefix_lm(model.config, kind)


def as_prefix_lm(config: ModelConfig, kind: PrefixKind) -> ModelConfig:
    """The config of the same stack in the words of model_type `bildung`, with `prefix_lm`.

    Raises ConfigError for a stack that these words cannot describe.
    """
    wanted = replace(config, model_type="bildung", prefix_lm=kind)
    plain = {field.name: field.default for field in fields(ModelConfig)}
    raw: dict[str, Any] = {"model_type": "bildung"}
    for name in CHOICES:
        value = getattr(wanted, name)
        if value != plain[name] and name not in ("rope", "local_rope", "windows"):
            raw[name] = list(value) if isinstance(value, tuple) else value
    if wanted.positions == "rope":
        raw["rope"] = asdict(wanted.rope)
    if wanted.positions == "rope" and wanted.local_rope is not None and any(wanted.windows):
        raw["local_rope"] = asdict(wanted.local_rope)
    if any(wanted.windows):
        raw["windows"] = list(wanted.windows)
    raw |= {name: number for name in SPECIAL if (number := getattr(wanted, name)) is not None}
    if wanted.eos_token_ids:
        raw["eos_token_id"] = list(wanted.eos_token_ids)
    made = from_dict(raw)
    if differ := [
        field.name for field in fields(BaseConfig) + fields(ModelConfig) if _differs(made, wanted, field.name)
    ]:
        raise ConfigError(
            f"a {config.model_type} with {', '.join(f'{name} = {getattr(config, name)!r}' for name in differ)} cannot "
            f"be written as model_type 'bildung', which a prefix language model is; start from another family."
        )
    return made


def _differs(made: ModelConfig, wanted: ModelConfig, name: str) -> bool:
    return name != "raw" and bool(getattr(made, name) != getattr(wanted, name))

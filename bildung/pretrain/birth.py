"""From a tokenizer to a model that has never seen anything: what the kinds of pretraining share.

    SOURCE holds a tokenizer only     a new model is built from `model`, the keys of a config.json
    SOURCE holds a model              it goes on learning

What a birth needs from the tokenizer (vocabulary size, ids of BOS, EOS and padding) is filled in.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BeforeValidator

from bildung.core import ranks
from bildung.core.errors import DataError, SettingsError
from bildung.core.settings import settings
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel, load
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.training import COMPUTE, Training, check_trainable

T = TypeVar("T")


def _as_json(given: Any) -> Any:
    """A mapping, its YAML, or a file of it, as JSON text: the record then holds the keys themselves."""
    text = given
    if isinstance(given, str):
        try:
            if given.endswith((".json", ".yaml", ".yml")):
                text = Path(given).expanduser().read_text(encoding="utf-8")
            given = yaml.safe_load(text)
        except OSError as error:
            raise ValueError(f"{given} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeError) as error:
            raise ValueError(f"{str(given)[:80]!r} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"the keys of a config.json are expected, as a mapping; {str(given)[:80]!r} is none")
    return json.dumps(_with_numbers(given), sort_keys=True, default=str)


def _with_numbers(given: Any) -> Any:
    """YAML takes 1e-5, without a point, for a word."""
    if isinstance(given, Mapping):
        return {str(key): _with_numbers(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_with_numbers(value) for value in given]
    return float(given) if isinstance(given, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", given) else given


Keys = Annotated[str, BeforeValidator(_as_json)]


@settings
class Birth(Training):
    """What every kind of pretraining can be told."""

    data: str  # what to learn from: a file, a folder, nursery:NAME, mini:NAME or hub:OWNER/NAME
    limit: int | None = None  # use only the first so many rows
    held_out: int = 32  # rows kept out of training, to measure on
    # of a new model: the keys of its config.json as a mapping, as "{model_type: llama, ...}", or as a .json/.yaml file
    model: Keys | None = None
    max_length: int = 256  # tokens per row
    learning_rate: float = 1e-3  # at the top of the schedule
    weight_decay: float = 0.1  # of matrices; vectors are never decayed
    batch_size: int = 16  # rows per micro-step
    checkpoint_every: int = 100  # steps between checkpoints; a killed run goes on from the last


def begin(source: Path, given: Birth, *, kinds: Sequence[str]) -> LanguageModel:
    """The model to train, in float32 and with every parameter trainable: a new one, or the source's.

    kinds: which kinds of model this objective can train (config.kind). Raises SettingsError when `model` is missing for
    a birth or given for a model that is there, and for rows longer than the model's context; ConfigError for its keys,
    DataError for a model of another kind.
    """
    if (source / "config.json").exists():
        if given.model is not None:
            raise SettingsError(
                f"{source} holds a model already, and settings for a new one were given in `model`. Leave `model` out "
                f"to go on training it, or give the directory of its tokenizer for a new one."
            )
        lm = load(source, "float32")
        check_trainable(lm, source)
    else:
        if given.model is None:
            raise SettingsError(
                f"{source} holds no model; to make one, give `model`: the keys of a config.json, such as model_type, "
                f"hidden_size and num_hidden_layers."
            )
        lm = newborn(Tokenizer.load(source), json.loads(given.model), given.seed)
    if lm.config.kind not in kinds:
        raise DataError(
            f"a {lm.config.model_type} is of kind {lm.config.kind!r}; this way of training is for {', '.join(kinds)}."
        )
    context = lm.config.max_position_embeddings
    if given.max_length > context:
        raise SettingsError(
            f"max_length = {given.max_length}, and the model's context has {context} tokens (max_position_embeddings): "
            f"it would learn what it can never be asked. Give --max-length {context} or less, or a longer context."
        )
    lm.model.requires_grad_(True)
    lm.model.compute_dtype = COMPUTE[given.precision]
    return lm


def newborn(tokenizer: Tokenizer, keys: dict[str, Any], seed: int) -> LanguageModel:
    """A model with random weights for this tokenizer. Raises ConfigError; TokenizerError for too small a vocabulary."""
    config = config_for(tokenizer, keys)
    return LanguageModel(build(config, seed).to(ranks.device()), tokenizer, config)


def config_for(tokenizer: Tokenizer, keys: dict[str, Any]) -> Any:
    """The config of a new model, with what the tokenizer knows filled in. Raises as `newborn`."""
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    known = {name: number for name, number in special.items() if number is not None}
    config = from_dict({"vocab_size": tokenizer.vocab_size, **known, **keys})
    tokenizer.check_fits(config.vocab_size)
    return config


def set_aside(items: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """(what to train on, what to measure on), chosen by seed. Raises DataError when nothing would be left."""
    if not 0 <= count < len(items):
        raise DataError(
            f"held_out = {count} of {len(items)} usable rows; at least one must stay to train on. "
            f"(A .txt file is one row; give many texts as .jsonl, or held_out 0.)"
        )
    chosen = set(random.Random(f"held out {seed}").sample(range(len(items)), count))
    kept = [item for index, item in enumerate(items) if index not in chosen]
    return kept, [items[index] for index in sorted(chosen)]

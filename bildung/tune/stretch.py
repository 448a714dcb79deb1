"""Give a model with a learned position table more positions (or fewer), by drawing it out between its neighbours.

    bildung tune stretch lives/gpt/base lives/gpt/long --positions 2048

Position p of the new table is the point at p · (old - 1) / (new - 1) of the old one, linear between the two vectors
around it: position interpolation as it was done for tables before RoPE had its own (Chen et al. 2023, arXiv 2306.15595;
for images Dosovitskiy et al. 2021, section 3.2). Neighbours are then closer than in training, so a few steps of
training on long texts should follow; without them the loss rises everywhere a little, instead of there being none
beyond the old end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from bildung.core.errors import ConfigError, ModelFileError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.evaluate import card
from bildung.evaluate.card import CardSettings
from bildung.model import names
from bildung.model.config import from_dict
from bildung.model.positions import AddedPositions, interpolate
from bildung.model.store import LanguageModel, assemble, load, state_tensors, write_model


@settings_class
class Settings:
    """Stretching a table of positions."""

    positions: int  # how many positions the model is to have
    card: CardSettings | None = None  # measure these tasks before and after


def stretch(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Stretch the table of `source` into `out`. Raises SettingsError, ModelFileError when there is no such table."""
    check_length(settings.positions)

    def work(job: Job) -> None:
        lm = load(source)
        if settings.card is not None:
            card.before(job, lm, settings.card)
        longer = stretched(lm, settings.positions)
        write_model(longer, job.out)
        job.measured |= {"positions_before": lm.config.max_position_embeddings, "positions_after": settings.positions}
        if settings.card is not None:
            card.after(job, longer, settings.card)

    return perform("tune stretch", source, out, settings, work, force=force)


def check_length(positions: int) -> None:
    """Raises SettingsError for a table of one row or none."""
    if positions < 2:
        raise SettingsError(f"positions = {positions}; a table has at least two.")


def check(lm: LanguageModel, positions: int) -> None:
    """Raises ModelFileError for a model without a learned table and for an adapter, SettingsError for no length."""
    check_length(positions)
    if getattr(lm.config, "positions", None) != "learned" or lm.config.kind == "vision":
        kind = "of an image, stretched by itself" if lm.config.kind == "vision" else "not a learned table"
        raise ModelFileError(f"the positions of this {lm.config.model_type} are {kind}: there is nothing to stretch.")
    if lm.added:
        raise ModelFileError("this is an adapter; `bildung merge` it into its base first, then stretch the result.")


def stretched(lm: LanguageModel, positions: int) -> LanguageModel:
    """The same model with a table of so many positions; rows before position 0 (RoBERTa, BART) stay as they are.

    Raises SettingsError, ModelFileError as `check` does.
    """
    check(lm, positions)
    tensors, table = state_tensors(lm.model), names.places(lm.config)
    for path, module in lm.model.named_modules():
        if isinstance(module, AddedPositions):
            name = names.place_of(f"{path}.weight", table)[0]
            before, rows = tensors[name][: module.offset], tensors[name][module.offset :]
            tensors[name] = torch.cat((before, interpolate(rows, positions)))
    config = from_dict(_longer(lm, positions))
    return replace(lm, model=assemble(config, tensors), config=config)


def _longer(lm: LanguageModel, positions: int) -> dict[str, object]:
    """config.json with that many positions. Some families count the rows before position 0 in their key."""
    key = "n_positions" if lm.config.model_type == "gpt2" else "max_position_embeddings"
    raw = {name: value for name, value in lm.config.raw.items() if name != "n_ctx"} | {key: positions}
    short = positions - from_dict(raw).max_position_embeddings
    raw[key] = positions + short
    if from_dict(raw).max_position_embeddings != positions:
        raise ConfigError(f"config.json: {key} of a {lm.config.model_type} does not say how long its table is.")
    return raw

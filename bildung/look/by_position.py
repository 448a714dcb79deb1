"""The loss at every position of a text, within the length that a model was trained on and beyond it.

    bildung look by_position lives/positions/rope OUT --data nursery:sotu --skip 200 --others lives/positions/alibi ...

What a model knows of positions shows where training never went. A learned table has no vector there; sums of waves and
rotations meet angles they have not seen; ALiBi's distances only go on growing (Press et al. 2022, figure 1, for whom
this picture was the argument). The loss also falls from left to right, for every model: more context, better guesses.

OUT gets by_position.json and by_position.png. All models read the same pieces of text, of `length` tokens each.
"""

# R rows of text, L positions

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import DataError, SettingsError
from bildung.core.hardware import Tidy, give_back_memory
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.examples import clm_examples
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.look.lenses.lens import check_writes
from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.model.store import LanguageModel, load
from bildung.train.objectives import surprisal

BATCH_TOKENS = 4096


@settings_class
class Settings:
    """Loss by position."""

    data: str  # text to read: a file, a folder, nursery:NAME, mini:NAME or hub:OWNER/NAME
    skip: int = 0  # so many documents at the start are left out: those that the models were trained on
    others: tuple[Path, ...] = ()  # the models to compare the source with
    length: int = 256  # tokens of each piece of text
    rows: int = 128  # how many pieces
    trained: int | None = None  # length that the models were trained on; default: max_length of the source's record
    bins: int = 32  # points of each curve: positions are averaged in so many groups
    title: str = ""  # above the picture


@dataclass(frozen=True)
class Curve:
    """One model. loss: mean nats per token of each group of positions; fewer than the others where its table ends."""

    name: str
    positions: str
    norm: str
    loss: list[float]
    within: float
    beyond: float | None


def by_position(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Measure and draw. Raises DataError for too little text or models of other tokenizers, SettingsError."""
    places = [Path(source), *settings.others]
    if not 2 <= settings.bins <= settings.length // 2 or settings.rows < 1 or settings.skip < 0:
        raise SettingsError("bins lies between 2 and half of length, rows is at least 1, skip at least 0.")
    if len({place.name for place in places}) < len(places):
        raise SettingsError(f"two models have the same name: {', '.join(place.name for place in places)}.")

    def work(job: Job) -> None:
        first = load(source)
        trained = settings.trained or _trained_length(first)
        tokens_RL = pieces(first, settings)
        give_back_memory()  # all of the text and its tokens, of which these are a few
        found = []
        for place in places:
            lm = first if place is places[0] else load(place)
            check_writes(lm)
            _check_reads_alike(first, lm, tokens_RL)
            found.append(curve(lm, place.name, tokens_RL, trained, settings.bins))
        numbers = {
            "length": settings.length,
            "trained": trained,
            "rows": len(tokens_RL),
            "models": list(map(asdict, found)),
        }
        (job.out / "by_position.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        draw(found, settings.length, trained, job.out / "by_position.png", settings.title)
        job.tokens_seen = tokens_RL.numel() * len(places)
        job.measured = {one.name: {"within": one.within, "beyond": one.beyond} for one in found}

    companions = {place.name: place for place in settings.others}
    data = fingerprint(settings.data)
    return perform("look by_position", source, out, settings, work, data=data, companions=companions, force=force)


def pieces(lm: LanguageModel, settings: Settings) -> Tensor:
    """Pieces of `length` tokens, spread evenly over the text. Raises DataError when there is none that long."""
    texts = list(documents(settings.data))[settings.skip :]
    if not texts:
        raise DataError(f"skip = {settings.skip} leaves nothing of {settings.data} to read.")
    whole = [one.tokens for one in clm_examples(lm.tokenizer, texts, settings.length) if len(one) == settings.length]
    if not whole:
        raise DataError(
            f"no document of {settings.data} has {settings.length} tokens; give longer ones, or less length."
        )
    step = max(1, len(whole) // settings.rows)
    return torch.tensor(whole[::step][: settings.rows])


@torch.no_grad()
def curve(lm: LanguageModel, name: str, tokens_RL: Tensor, trained: int, bins: int) -> Curve:
    """The loss of one model at every position after the first, averaged over rows and within groups."""
    config = lm.config
    loss_L = losses(lm, readable(lm, tokens_RL))
    width = tokens_RL.shape[1] / bins
    groups = [loss_L[math.ceil(i * width) : math.ceil((i + 1) * width)] for i in range(bins)]
    full = [group for i, group in enumerate(groups) if math.ceil((i + 1) * width) - 1 <= len(loss_L)]
    return Curve(
        name=name,
        positions=getattr(config, "positions", config.kind),
        norm=getattr(config, "norm", ""),
        loss=[group.mean().item() for group in full if len(group)],
        within=loss_L[: trained - 1].mean().item(),
        beyond=loss_L[trained - 1 :].mean().item() if len(loss_L) >= trained else None,
    )


def readable(lm: LanguageModel, tokens_RL: Tensor) -> Tensor:
    """The tokens at positions that the model has: a learned table ends."""
    learned = getattr(lm.config, "positions", "") == "learned"
    return tokens_RL[:, : lm.config.max_position_embeddings] if learned else tokens_RL


def losses(lm: LanguageModel, tokens_RL: Tensor) -> Tensor:
    """Mean -log p of the token after each position but the last, nats, float32 (L - 1,)."""
    total_L, tidy = torch.zeros(tokens_RL.shape[1] - 1), Tidy()
    for rows in tokens_RL.split(max(1, BATCH_TOKENS // tokens_RL.shape[1])):
        rows = rows.to(lm.model.device)
        h_RLD = lm.model.hidden(rows)[:, :-1]
        total_L += surprisal(lm.model, h_RLD.flatten(0, 1), rows[:, 1:].flatten()).view(len(rows), -1).sum(0).cpu()
        tidy()
    return total_L / len(tokens_RL)


def _trained_length(lm: LanguageModel) -> int:
    given: dict[str, Any] = lm.record.settings if lm.record is not None else {}
    if not isinstance(given.get("max_length"), int):
        raise SettingsError("the source's record does not say how long its training rows were; give `trained`.")
    return int(given["max_length"])


def _check_reads_alike(first: LanguageModel, lm: LanguageModel, tokens_RL: Tensor) -> None:
    text = first.tokenizer.decode(tokens_RL[0].tolist())
    if lm.tokenizer.encode(text) != first.tokenizer.encode(text):
        raise DataError(f"{lm.path} has another tokenizer than {first.path}: losses per token cannot be compared.")


def draw(curves: Sequence[Curve], length: int, trained: int, path: Path, title: str = "") -> None:
    """One picture, a line per model. A line that is far above the others is left out of it, and its number said."""
    bins = max(len(one.loss) for one in curves)
    places = [(i + 0.5) * length / bins for i in range(bins)]
    low = min(min(one.loss) for one in curves)
    near = [max(one.loss) for one in curves if max(one.loss) < low + 1.2]
    top = max(near, default=low + 1.0) + 0.15
    lines = {}
    for one in curves:
        name = one.name if len(one.loss) == bins else f"{one.name} (ends)"
        lines[f"{name} ↑ {one.loss[-1]:.1f}" if one.loss[-1] > top else name] = (places[: len(one.loss)], one.loss)
    panel = Panel(
        title,
        "position: tokens read before",
        lines,
        y_limits=(low - 0.1, top),
        y_label="loss, nats per token",
        shaded=(trained, f"beyond the {trained} tokens of training"),
    )
    draw_lines([panel], path)

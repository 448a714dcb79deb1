"""Where a model looks in the source while it answers: the attention of each word of the answer, as a picture.

    bildung look alignment lives/g2p/bahdanau OUT --source "t h o u g h t" "k n i g h t"

Dark is much attention; a row adds up to 1. Of an encoder-decoder Transformer the last layer's, the mean of its heads.
OUT gets alignment.png and alignment.json.
"""

# S source length, L answer length

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.seq2seq import encode_source
from bildung.look.pages.picture import BLUES, DPI, FONT, INK, MUTED, RULE, drawable, save_figure
from bildung.look.prompt import label
from bildung.model.store import LanguageModel, load
from bildung.model.taps import observe, sites
from bildung.run.loop import decode
from bildung.run.sources import reading

ACROSS = 4  # pictures in a row


@settings_class
class Settings:
    """Alignments."""

    source: tuple[str, ...]  # texts to answer
    new_tokens: int = 40  # length of an answer at most


@dataclass(frozen=True)
class Aligned:
    """One answer and where it came from: weights[l][s] is how much answer token l looks at source token s."""

    source: list[str]
    answer: list[str]
    weights: list[list[float]]


def alignment(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the picture and the numbers. Raises SettingsError for a model that attends to no source."""

    def work(job: Job) -> None:
        lm = load(source)
        if not settings.source:
            raise SettingsError("give at least one --source, a text to answer.")
        found = [align(lm, text, settings.new_tokens) for text in settings.source]
        text = json.dumps([asdict(one) for one in found], ensure_ascii=False)
        (job.out / "alignment.json").write_text(text + "\n", encoding="utf-8")
        draw(found, job.out / "alignment.png")
        job.tokens_seen = sum(len(one.source) for one in found)
        job.measured = {" ".join(one.source): " ".join(one.answer) for one in found}

    return perform("look alignment", source, out, settings, work, force=force)


@torch.inference_mode()
def align(lm: LanguageModel, text: str, new_tokens: int = 40) -> Aligned:
    """Answer `text` greedily and read the attention. Raises SettingsError for a model that attends to no source."""
    looks = [site for site in sites(lm.model) if site.endswith("cross.probs")]
    if not looks:
        raise SettingsError(f"a {lm.config.model_type} of this kind attends to no source; there is nothing to draw.")
    ids = encode_source(lm.tokenizer, text)
    given, starts, rules = reading(lm.model, [ids])
    (answer,) = decode(given, starts, new_tokens=new_tokens, rules=rules, stop_ids=lm.config.eos_token_ids)
    if not answer.tokens:
        raise DataError(f"the answer to {text!r} is empty.")
    read = torch.tensor([[*starts[0], *answer.tokens[:-1]]], device=lm.model.device)
    with observe(lm.model, looks[-1]) as seen:
        given(read)
    probs: Tensor = seen[looks[-1]].float()
    probs_LS = (probs.mean(dim=1) if probs.ndim == 4 else probs)[0]
    return Aligned(
        [label(lm.tokenizer, number) for number in ids],
        [label(lm.tokenizer, number) for number in answer.tokens],
        [[round(weight, 4) for weight in row] for row in probs_LS.tolist()],
    )


def draw(found: list[Aligned], path: Path) -> None:
    """The alignments as a PNG, answers down, sources across."""
    across, down = min(ACROSS, len(found)), -(-len(found) // ACROSS)
    # Cells are squares of one size: columns and rows as wide and high as their largest picture.
    widths = [max(len(one.source) for one in found[column::across]) + 3 for column in range(across)]
    heights = [max(len(one.answer) for one in found[row * across :][:across]) + 2 for row in range(down)]
    figure = Figure(figsize=(0.2 * sum(widths), 0.2 * sum(heights)), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(down, across, squeeze=False, width_ratios=widths, height_ratios=heights).flatten()
    for axis, one in zip(axes, found, strict=False):
        _draw_one(axis, one)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    save_figure(figure, path)


def _draw_one(axis: Axes, one: Aligned) -> None:
    axis.imshow(one.weights, cmap=BLUES, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    axis.set_anchor("N")
    plain: dict[str, Any] = {"family": FONT, "fontsize": 7, "color": INK, "parse_math": False}
    axis.set_xticks(range(len(one.source)), [drawable(word) for word in one.source], **plain)
    axis.set_yticks(range(len(one.answer)), [drawable(word) for word in one.answer], **plain)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, colors=MUTED)
    for spine in axis.spines.values():
        spine.set_color(RULE)

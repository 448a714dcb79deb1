"""The accuracy matrix of a sequence of tasks, and the four numbers it is summed up in.

    R[i, j]   the score on task j after learning task i, higher is better; row 0: before any task

              a    b    c
    before   .50  .50  .33
    after a  .90  .60  .30        the diagonal: what was just learned
    after b  .80  .90  .40        below it: what is left of earlier tasks
    after c  .70  .85  .80        above it: what a task gains before it is learned

    average accuracy     mean over j of R[T, j]                                    Lopez-Paz & Ranzato 2017, eq. 2
    backward transfer    mean over j < T of R[T, j] - R[j, j]                      eq. 3
    forward transfer     mean over j > 1 of R[j - 1, j] - R[0, j]                  eq. 4; their b is our row 0
    forgetting           mean over j < T of max over l < T of R[l, j] - R[T, j]    Chaudhry et al. 2018, section 3

    (Gradient episodic memory, arXiv 1706.08840; Riemannian walk, arXiv 1801.10112.)

Forgetting is backward transfer with its sign turned, except that it compares with the best a task ever was; it is
negative where later tasks helped. Its maximum runs over l = 1 ... T-1, before the task was learned too. The paper's b
is a model with random weights; here it is the model that the sequence starts from, so a pretrained model's knowledge
does not count as transfer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bildung.core.errors import DataError
from bildung.look.pages.picture import BLUES, DPI, FONT, INK, MUTED, drawable, save_figure

Row = Mapping[str, float]


def summary(names: Sequence[str], before: Row, after: Sequence[Row]) -> dict[str, float | None]:
    """The four numbers of the scores `before` any task and `after` each; None where one task leaves nothing to compare.

    Raises DataError when a score is missing.
    """
    R = _matrix(names, before, after)
    T = len(names)
    last, diagonal = R[T], [R[i + 1][i] for i in range(T)]
    found: dict[str, float | None] = {"average_accuracy": sum(last) / T}
    if T == 1:
        return found | {"backward_transfer": None, "forward_transfer": None, "forgetting": None}
    return found | {
        "backward_transfer": sum(last[j] - diagonal[j] for j in range(T - 1)) / (T - 1),
        "forward_transfer": sum(R[j][j] - R[0][j] for j in range(1, T)) / (T - 1),
        "forgetting": sum(max(R[i][j] for i in range(1, T)) - last[j] for j in range(T - 1)) / (T - 1),
    }


def _matrix(names: Sequence[str], before: Row, after: Sequence[Row]) -> list[list[float]]:
    if len(after) != len(names):
        raise DataError(f"{len(names)} tasks and scores after {len(after)} of them; each is measured after every task.")
    for number, row in enumerate([before, *after]):
        if missing := [name for name in names if name not in row]:
            raise DataError(f"row {number} of the accuracy matrix has no score of {', '.join(missing)}.")
    return [[row[name] for name in names] for row in [before, *after]]


def table(names: Sequence[str], before: Row, after: Sequence[Row], figures: Mapping[str, float | None]) -> str:
    """The matrix and its figures in lines of text."""
    R = _matrix(names, before, after)
    titles = ["before", *(f"after {name}" for name in names)]
    wide, column = max(map(len, titles)), max(8, *(len(name) + 2 for name in names))
    lines = [" " * wide + "".join(f"{name:>{column}}" for name in names)]
    lines += [
        f"{title:<{wide}}" + "".join(f"{value:>{column}.3f}" for value in row)
        for title, row in zip(titles, R, strict=True)
    ]
    shown = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items() if value is not None)
    return "\n".join([*lines, ", ".join(shown)])


def draw(names: Sequence[str], before: Row, after: Sequence[Row], path: Path, title: str, kind: str) -> None:
    """The matrix as a picture, darker is better. kind: what the numbers are."""
    R = np.array(_matrix(names, before, after))
    figure = Figure(figsize=(1.6 + 0.95 * len(names), 1.1 + 0.42 * len(R)), dpi=DPI, layout="constrained")
    axis: Any = figure.subplots()
    low, high = float(R.min()), float(R.max())
    axis.imshow(R, cmap=BLUES, vmin=low - 0.05 * (high - low) - 1e-9, vmax=high + 1e-9, aspect="auto")
    for i, row in enumerate(R):
        for j, value in enumerate(row):
            dark = value > low + 0.65 * (high - low)
            bold = "bold" if i == j + 1 else "normal"
            colour = "white" if dark else INK
            axis.text(
                j, i, f"{value:.3f}", ha="center", va="center", fontsize=8, color=colour, family=FONT, weight=bold
            )
    shown = [drawable(name) for name in names]
    axis.set_xticks(range(len(names)), shown, fontsize=8, color=INK, family=FONT, parse_math=False)
    labels = ["before", *(f"after {name}" for name in shown)]
    axis.set_yticks(range(len(R)), labels, fontsize=8, color=INK, family=FONT, parse_math=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(drawable(title), fontsize=9, color=INK, loc="left", family=FONT, parse_math=False)
    axis.set_xlabel(f"{kind}; bold: the task just learned", fontsize=7.5, color=MUTED, family=FONT)
    save_figure(figure, path)

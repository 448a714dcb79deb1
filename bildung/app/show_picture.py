"""The architecture as a drawing, in the manner of figure 1 of Vaswani et al. 2017.

One column per stack, one block of it opened, the stream running upwards; beside it, where the parameters and the work
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from bildung.app.show import Shown
from bildung.app.show_stacks import Box, Stack, kind_of, stacks_of
from bildung.core.errors import OutputError

INK, MUTED, RULE = "#20242c", "#626976", "#b9b4aa"
FONT = "DejaVu Sans"
KINDS = {  # what a part is for -> its colour
    "embedding": "#cfe3c8",
    "attention": "#a9cbe9",
    "scores, mixing": "#5f9fd1",
    "feed-forward": "#f3c3a3",
    "recurrence": "#a9cbe9",
    "norms": "#eae6dd",
    "unembedding, heads": "#d9cfea",
    "deltas": "#bf4b12",
}
WIDTH, STEP = 3.0, 0.78  # of a box; from one to the next


def draw(shown: Shown, path: Path) -> None:
    """Draw the model into a .png, .svg or .pdf file. Raises OutputError when it cannot be written."""
    stacks = stacks_of(shown)
    figure = Figure(dpi=150, facecolor="white", layout="constrained")
    drawing, right = figure.subplots(1, 2, width_ratios=(2.55 * len(stacks), 3.6))
    tops = [Column(drawing, 4.5 * index, stack).draw() for index, stack in enumerate(stacks)]
    if len(stacks) == 2 and (cross := stacks[1].cross_at) is not None:
        _memory(drawing, tops[0], 4.5, cross)
    drawing.set_axis_off()
    drawing.set_xlim(-2.2, 4.5 * len(stacks) - 2.3)
    drawing.set_ylim(-1.0, max(tops) + 0.1)
    figure.set_size_inches(2.55 * len(stacks) + 4.1, max(0.52 * max(tops) + 1.2, 4.4))
    _bars(right, shown)
    config, millions = shown.config, sum(part.parameters for part in shown.parts) / 1e6
    name = "" if shown.name == config.model_type else f"{shown.name}   "
    title = f"{name}{config.model_type}, {millions:,.1f} million parameters"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, family=FONT, parse_math=False)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from error


@dataclass
class Column:
    """One stack, drawn from the bottom up around x; `y` is how far it has come."""

    axes: Axes
    x: float
    stack: Stack
    y: float = 0.0

    def draw(self) -> float:
        """Draws everything; returns how high it came."""
        self.text(self.x, -0.72, self.stack.name, 9, INK)
        for box in self.stack.below:
            self.box(box)
        bottom = self.y - 0.25
        self.y += 0.5 * STEP
        for branches, behind in self.stack.sublayers:
            self.sublayer(branches, behind)
        top = self.y - 0.3
        frame = FancyBboxPatch(
            (self.x - WIDTH / 2 - 0.45, bottom),
            WIDTH + 0.9,
            top - bottom,
            boxstyle="round,pad=0,rounding_size=0.15",
            facecolor="none",
            edgecolor=RULE,
            linewidth=1,
        )
        self.axes.add_patch(frame)
        self.text(self.x + WIDTH / 2 + 0.35, bottom + 0.19, self.stack.repeated, 9, INK, ha="right")
        self.y += 0.2 * STEP
        for box in self.stack.above:
            self.box(box)
        if self.stack.heads:
            self.side_by_side(self.stack.heads)
        else:
            self.arrow(self.y - 0.52, self.y - 0.1)
        return self.y

    def sublayer(self, branches: list[list[Box]], behind: list[Box]) -> None:
        """Boxes beside the stream, the addition, and what stands on the stream behind it."""
        start, left = self.y - 0.44, self.x - WIDTH / 2 - 0.22
        places = self.side_by_side(branches, arrows=False)
        self.y -= 0.12
        self.line((min(places), self.y - 0.2), (max(places), self.y - 0.2))
        if not self.stack.residual:
            self.line((self.x, self.y - 0.2), (self.x, self.y + 0.3))
            self.y += 0.6
            return
        self.line((left, start), (self.x, start))
        self.line((left, start), (left, self.y), (self.x - 0.13, self.y))
        self.line((self.x, self.y - 0.2), (self.x, self.y))
        circle = {"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": INK, "linewidth": 0.8}
        self.axes.text(self.x, self.y, "+", ha="center", va="center", fontsize=9, color=INK, family=FONT, bbox=circle)
        self.line((self.x, self.y + 0.14), (self.x, self.y + 0.3))
        self.y += STEP
        for box in behind:
            self.box(box)

    def side_by_side(self, chains: list[list[Box]], arrows: bool = True) -> list[float]:
        """Chains of boxes that start from the stream; returns where they stand. arrows: they end in one each."""
        start, tall, gap = self.y - 0.44, max(map(len, chains)), 0.12
        width = (WIDTH - gap * (len(chains) - 1)) / len(chains)
        places = [self.x + (index - (len(chains) - 1) / 2) * (width + gap) for index in range(len(chains))]
        self.line((min(places), start), (max(places), start))
        self.line((self.x, start - 0.16), (self.x, start))
        for x, boxes in zip(places, chains, strict=True):
            for step, box in enumerate(boxes):
                self.box(box, at=(x, self.y + step * STEP), width=width)
                if "encoder" in box.word:
                    self.stack.cross_at = self.y + step * STEP
            top = self.y + (len(boxes) - 1) * STEP + 0.26
            if arrows:
                self.arrow(top, top + 0.4, x)
            else:
                self.line((x, top), (x, self.y + tall * STEP - 0.32))
        self.y += tall * STEP
        return places

    def box(self, box: Box, at: tuple[float, float] | None = None, width: float = WIDTH) -> None:
        """A box centred at (x, y), with an arrow into it from below."""
        x, y = at or (self.x, self.y)
        patch = FancyBboxPatch(
            (x - width / 2, y - 0.26), width, 0.52,
            boxstyle="round,pad=0,rounding_size=0.09", facecolor=KINDS[box.kind], edgecolor="none",
        )  # fmt: skip
        self.arrow(y - 0.52, y - 0.27, x)
        self.axes.add_patch(patch)
        if width < WIDTH:  # there is room for half of the words
            word = box.word if len(box.word) <= 20 else box.word.split(",")[0]
            note = box.note.split("   ")[-1].split(", ")[0]
            self.text(x, y, f"{word}\n{note}" if note else word, 5.8, INK)
        elif box.note:
            self.text(x, y + 0.1, box.word, 7, INK)
            self.text(x, y - 0.12, box.note, 5.4, MUTED)
        else:
            self.text(x, y, box.word, 7, INK)
        if at is None:
            self.y += STEP

    def arrow(self, low: float, high: float, x: float | None = None) -> None:
        """Upwards."""
        x = self.x if x is None else x
        self.axes.add_patch(
            FancyArrowPatch(
                (x, low), (x, high), arrowstyle="-|>", mutation_scale=6, color=INK, lw=0.8, shrinkA=0, shrinkB=0
            )
        )

    def line(self, *points: tuple[float, float]) -> None:
        """Through these points."""
        self.axes.plot(*zip(*points, strict=True), color=INK, linewidth=0.8, solid_joinstyle="round")

    def text(self, x: float, y: float, words: str, size: float, colour: str, ha: Any = "center") -> None:
        """Centred on (x, y) unless `ha` says otherwise."""
        self.axes.text(x, y, words, ha=ha, va="center", fontsize=size, color=colour, family=FONT, parse_math=False)


def _memory(axes: Axes, top: float, x: float, cross: float) -> None:
    """From the encoder's top to the decoder's cross-attention."""
    middle = x - 2.25
    axes.plot([0, 0, middle, middle], [top, top + 0.12, top + 0.12, cross], color=INK, linewidth=0.8)
    axes.add_patch(
        FancyArrowPatch(
            (middle, cross),
            (x - WIDTH / 2, cross),
            arrowstyle="-|>",
            mutation_scale=6,
            color=INK,
            lw=0.8,
            shrinkA=0,
            shrinkB=0,
        )
    )


def _bars(axes: Axes, shown: Shown) -> None:
    """Two stacked bars: where the parameters are, and where the work is."""
    wholes = {"parameters": [], "multiply-adds": []}  # type: dict[str, list[tuple[str, int]]]
    for part in shown.parts:
        wholes["parameters"] += [(kind_of(part.name), part.parameters), ("deltas", part.delta_parameters)]
        wholes["multiply-adds"].append((kind_of(part.name), part.multiply_adds))
    axes.set_axis_off()
    axes.set_xlim(-0.1, 3.4)
    axes.set_ylim(-0.12, 1.06)
    for column, (title, numbers) in enumerate(wholes.items()):
        _bar(axes, 1.75 * column, title, numbers)
    what = "one image" if shown.config.kind == "vision" else f"{shown.length} tokens in a row"
    axes.text(1.75, -0.06, what, fontsize=6.5, color=MUTED, family=FONT, ha="left")


def _bar(axes: Axes, x: float, title: str, numbers: Sequence[tuple[str, int]]) -> None:
    whole = sum(number for _, number in numbers)
    axes.text(x, 1.03, f"{title}: {_short(whole)}", fontsize=7.5, color=INK, family=FONT)
    low, last = 0.0, -1.0
    for kind, colour in KINDS.items():
        share = sum(number for name, number in numbers if name == kind) / whole if whole else 0
        if not share:
            continue
        axes.bar(x + 0.16, share, width=0.32, bottom=low, color=colour, edgecolor="white", linewidth=0.6)
        if share >= 0.004:
            place = max(low + share / 2, last + 0.035)  # labels of thin slices do not lie on each other
            axes.text(x + 0.38, place, f"{kind} {share:.1%}", fontsize=6, color=INK, va="center", family=FONT)
            last = place
        low += share


def _short(number: int) -> str:
    for unit, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= unit:
            return f"{number / unit:.1f}{word}"
    return str(number)

"""The picture of `tokenizer compare`: one panel per number, one group of bars per text, one colour per tokenizer."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bildung.tokenizer.measure import Measured

INK, MUTED, RULE = "#20242c", "#626976", "#d9d5ce"
# Distinct in print and to the colour-blind (Okabe & Ito 2008), darkened where they would be faint on white.
COLOURS = ("#1c69ad", "#d55e00", "#009e73", "#b8860b", "#8f4f9f", "#4aa3c7", "#6b6b6b", "#c2185b", "#7a5230")
FONT = "DejaVu Sans"
DPI = 150
BAR = 0.23  # inches


def draw(found: dict[str, dict[str, Measured]], path: Path) -> None:
    """Writes {text: {tokenizer: Measured}} as a PNG. The unknown rates get a panel when there are any."""
    names = list(next(iter(found.values())))
    panels = [
        ("tokens per word", [[of[name].tokens_per_word for name in names] for of in found.values()], "{:.2f}"),
        ("bytes per token", [[of[name].bytes_per_token for name in names] for of in found.values()], "{:.2f}"),
    ]
    if any(of.unknown for by_name in found.values() for of in by_name.values()):
        rates = [[100 * of[name].unknown_rate for name in names] for of in found.values()]
        panels.append(("unknown tokens, %", rates, "{:.3g}"))
    height = BAR * (len(names) + 0.8) * len(found) + 0.75 + 0.2 * -(-len(names) // 4)
    figure = Figure(figsize=(3.1 * len(panels) + 1.2, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        _bars(axis, values, form)
        axis.set_title(title, fontsize=8.5, color=INK, loc="left", family=FONT)
    group = len(names) + 0.8
    middles = [place * group + (len(names) - 1) / 2 for place in range(len(found))]
    axes[0].set_yticks(middles, [_short(text) for text in found], family=FONT, color=INK, parse_math=False)
    axes[0].set_ylim(group * len(found) - 0.9, -0.9)
    handles = [matplotlib.patches.Patch(color=COLOURS[at % len(COLOURS)]) for at in range(len(names))]
    legend = figure.legend(handles, names, loc="outside upper left", ncols=4, frameon=False, fontsize=7.5)
    for label in legend.get_texts():
        label.set_parse_math(False)
        label.set_color(INK)
    # Without Software and date the same numbers give the same bytes.
    figure.savefig(path, metadata={"Software": None, "Title": "bildung tokenizer compare"})


def _bars(axis: Axes, values: list[list[float]], form: str) -> None:
    """Groups of horizontal bars, each with its number at the end."""
    group = len(values[0]) + 0.8
    most = max(max(row) for row in values) or 1.0
    for place, row in enumerate(values):
        for at, value in enumerate(row):
            y = place * group + at
            axis.barh(y, value, height=0.82, color=COLOURS[at % len(COLOURS)])
            axis.text(value + most * 0.015, y, form.format(value), va="center", fontsize=6.5, color=INK, family=FONT)
    axis.set_xlim(0, most * 1.16)
    axis.tick_params(length=0, labelsize=7.5, colors=MUTED)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=RULE, linewidth=0.6)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color(RULE)


def _short(text: str) -> str:
    return text if len(text) <= 24 else "…" + text[-23:]

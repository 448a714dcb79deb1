"""Pictures of what a look found, for a slide or a report; the pages show the same with details on every cell."""

# N layers, H heads, L query positions, S key positions

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

INK, MUTED, RULE = "#20242c", "#626976", "#d9d5ce"
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#a9cbe9", "#1c69ad"])
ORANGES = LinearSegmentedColormap.from_list("oranges", ["#ffffff", "#f3c3a3", "#bf4b12"])
DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#bf4b12", "#f3c3a3", "#ffffff", "#a9cbe9", "#1c69ad"])
FONT, MONO = "DejaVu Sans", "DejaVu Sans Mono"  # the two that matplotlib brings along
DPI = 150
LONGEST = 9  # characters in a cell


def draw_lens(numbers: dict[str, Any], path: Path) -> None:
    """The grid of lens.json as a PNG; with two models A, B and the difference, side by side."""
    shown = [("a", numbers["model"]), ("b", numbers["against"])] if "b" in numbers else [("a", numbers["model"])]
    layers, length = len(numbers["a"]["rank"]), len(numbers["labels"])
    panels = len(shown) + (len(shown) > 1)
    width, height = max(2.6, 0.66 * length), 0.215 * layers + 1.15
    figure = Figure(figsize=(width * panels + 0.6, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, (key, name) in zip(axes, shown, strict=False):
        side = numbers[key]
        texts = [[numbers["words"][str(top[0])] for top in row] for row in side["top_ids"]]
        values = np.array([[top[0] for top in row] for row in side["top_probs"]])
        title = f"{key.upper()}  {name}" if len(shown) > 1 else name
        _heat(axis, values, texts, BLUES, 1.0)
        _frame(axis, numbers["labels"], layers, f"{title}: top token, coloured by its probability")
    if len(shown) > 1:
        values = np.array(numbers["kl_ab"])
        texts = [[""] * length for _ in range(layers)]
        for column, row in enumerate(numbers["first_difference"]):
            if row >= 0:
                texts[row][column] = "first"
        _heat(axes[-1], values, texts, ORANGES, max(float(values.max()), 1e-6))
        title = f"KL(A‖B), 0 to {values.max():.2g} nats; first: top tokens part"
        _frame(axes[-1], numbers["labels"], layers, title)
    save_figure(figure, path)


def draw_heads(probs_NHLS: np.ndarray, title: str, path: Path, difference: bool = False) -> None:
    """Every head's pattern as a small square, layers down, heads across. difference: values from -1 to 1."""
    N, H, L, _ = probs_NHLS.shape
    gap = max(1, L // 12)
    sheet = np.full((N * (L + gap) - gap, H * (L + gap) - gap), np.nan)
    for n in range(N):
        for h in range(H):
            sheet[n * (L + gap) :, h * (L + gap) :][:L, :L] = probs_NHLS[n, h]
    side = 0.52
    figure = Figure(figsize=(max(3.6, H * side + 0.7), N * side + 0.9), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    # The square root lifts the small weights, which are most of a pattern, above white.
    shown = sheet if difference else np.sqrt(sheet)
    high = max(float(np.nanmax(np.abs(sheet))), 1e-6) if difference else 1.0  # most tunes move attention by little
    low = -high if difference else 0.0
    colours = (DIVERGING if difference else BLUES).with_extremes(bad="#ece9e3")
    axis.imshow(shown, cmap=colours, vmin=low, vmax=high, interpolation="nearest", aspect="equal")
    middles = np.arange(max(N, H)) * (L + gap) + L / 2 - 0.5
    axis.set_xticks(middles[:H], [str(h) for h in range(H)])
    axis.set_yticks(middles[:N], [str(n) for n in range(N)])
    axis.set_xlabel("head", fontsize=8, color=MUTED, family=FONT)
    axis.set_ylabel("layer", fontsize=8, color=MUTED, family=FONT)
    _calm(axis, f"{title}, full colour: {high:.2f}" if difference else title)
    save_figure(figure, path)


def drawable(text: str) -> str:
    """`text` with what the picture's font has no glyph for as "□" (a model may say anything)."""
    return "".join(character if ord(character) in _glyphs() else "□" for character in text)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont(MONO)).get_charmap())


def _heat(axis: Axes, values: np.ndarray, texts: list[list[str]], colours: Any, highest: float) -> None:
    axis.imshow(values, cmap=colours, vmin=0, vmax=highest, aspect="auto")
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            short = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
            ink = "white" if values[row, column] > 0.6 * highest else INK
            axis.text(column, row, drawable(short), ha="center", va="center", fontsize=5.6, color=ink, **_plain())


def _frame(axis: Axes, labels: list[str], layers: int, title: str) -> None:
    short = [drawable(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…") for text in labels]
    axis.set_xticks(range(len(labels)), short, rotation=40, ha="right", rotation_mode="anchor", **_plain())
    axis.set_yticks(range(layers), [str(n) for n in range(layers)])
    axis.set_ylabel("layer", fontsize=7, color=MUTED, family=FONT)
    _calm(axis, title)


def _calm(axis: Axes, title: str) -> None:
    axis.set_title(drawable(title), fontsize=7.5, color=INK, loc="left", family=FONT, parse_math=False)
    axis.tick_params(length=0, labelsize=6, colors=MUTED)
    for spine in axis.spines.values():
        spine.set_color(RULE)


def _plain() -> dict[str, Any]:
    return {"family": MONO, "parse_math": False}  # "$x$" in a token is no formula


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    # Without Software and date the same numbers give the same bytes.
    figure.savefig(
        path, metadata={"Software": None, "Title": "bildung", "Source": f"matplotlib {matplotlib.__version__}"}
    )

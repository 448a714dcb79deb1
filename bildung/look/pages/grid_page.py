"""Grids of what an intervention did, layers down: an offline page of tables and the same as a picture.

Colours start at the value of no effect (`neutral`): blue where the answer came nearer, orange where it went away.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bildung.look.pages.page import look_page
from bildung.look.pages.picture import DIVERGING, DPI, FONT, INK, MUTED, RULE, drawable, save_figure

STRONG = 0.66


def write_grids(numbers: Mapping[str, Any], page: Path, picture: Path) -> None:
    """numbers: title, model, metric, clean, corrupted, example {name: text}, command, low, high and grids, each with
    title, note, columns, rows, values [row][column], neutral."""
    shown = [grid | {"corner": "layer", "cells": _cells(grid)} for grid in numbers["grids"]]
    page.write_text(look_page("grids.html", **{**numbers, "grids": shown}), encoding="utf-8")
    draw_grids(numbers, picture)


def _away(grid: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Distances from no effect, and the largest (at least 0.05, so that noise is not painted as an effect)."""
    away = np.array(grid["values"], dtype=float) - grid["neutral"]
    return away, max(float(np.abs(away).max()), 0.05)


def _cells(grid: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    away, widest = _away(grid)
    return [
        [
            {
                "text": f"{value:z.2f}",
                "title": f"{grid['title']}, layer {grid['rows'][n]}, {grid['columns'][c]}: {value:.4f}",
                "v": round(abs(far) / widest, 3),
                "style": ("minus" if far < 0 else "") + (" strong" if abs(far) / widest > STRONG else ""),
            }
            for c, (value, far) in enumerate(zip(values, fars, strict=True))
        ]
        for n, (values, fars) in enumerate(zip(grid["values"], away, strict=True))
    ]


def draw_grids(numbers: Mapping[str, Any], path: Path) -> None:
    """The grids side by side as a PNG."""
    grids = numbers["grids"]
    widths = [max(2.0, 0.36 * len(grid["columns"]) + 0.7) for grid in grids]
    height = 0.17 * max(len(grid["rows"]) for grid in grids) + 1.3
    figure = Figure(figsize=(sum(widths), height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(grids), squeeze=False, width_ratios=widths)[0]
    for axis, grid in zip(axes, grids, strict=True):
        _draw(axis, grid)
    title = f"{numbers['model']}: {numbers['title']}, {numbers['metric'].replace('_', ' ')}"
    figure.suptitle(drawable(title), fontsize=8.5, color=INK, family=FONT, x=0.01, ha="left", parse_math=False)
    save_figure(figure, path)


def _draw(axis: Axes, grid: Mapping[str, Any]) -> None:
    away, widest = _away(grid)
    axis.imshow(away, cmap=DIVERGING, vmin=-widest, vmax=widest, aspect="auto", interpolation="nearest")
    row, column = np.unravel_index(int(np.abs(away).argmax()), away.shape)
    ink = "white" if widest > 0.05 else INK
    text = f"{grid['values'][row][column]:z.2f}"
    axis.text(float(column), float(row), text, ha="center", va="center", fontsize=5.5, color=ink, family=FONT)
    axis.set_xticks(range(len(grid["columns"])), [drawable(name) for name in grid["columns"]], rotation=45, ha="right")
    step = max(1, len(grid["rows"]) // 15)
    axis.set_yticks(range(0, len(grid["rows"]), step), grid["rows"][::step])
    title = f"{grid['title']} ({grid['note']})"
    axis.set_title(drawable(title), fontsize=7, color=INK, loc="left", family=FONT, parse_math=False)
    axis.tick_params(length=0, labelsize=6, colors=MUTED)
    for spine in axis.spines.values():
        spine.set_color(RULE)

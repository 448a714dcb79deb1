"""A Patchscope as numbers, page and picture: a grid of what the patched runs say, coloured by a probability.

Where source and target share a vocabulary the colour is the probability of the token that the source model itself says
next (the next-token task of the paper), else that of the run's own first token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bildung.look.pages.page import look_page
from bildung.look.pages.picture import BLUES, DPI, FONT, INK, MONO, MUTED, RULE, drawable, save_figure
from bildung.look.patchscopes.patch_targets import Target
from bildung.look.patchscopes.patchscopes import Patchscoped
from bildung.look.prompt import label
from bildung.model.store import LanguageModel

STRONG = 0.66
SHORT = 14  # characters of a cell


def as_json(
    lm: LanguageModel, into: LanguageModel, tokens: list[int], target: Target, found: Patchscoped, columns: list[int]
) -> dict[str, Any]:
    """Everything the page and the picture show; `cells` are in the order of the runs, each with its row and column."""
    rows = sorted({cell.layer for cell in found.cells})
    by_position = len({cell.position for cell in found.cells}) > 1
    cells = []
    for r, cell in enumerate(found.cells):
        top = zip(found.top_ids_RK[r].tolist(), found.top_probs_RK[r].tolist(), strict=True)
        one: dict[str, Any] = {
            "row": rows.index(cell.layer),
            "column": columns.index(cell.position if by_position else cell.target_layer),
            "position": cell.position,
            "layer": cell.layer,
            "target_layer": cell.target_layer,
            "top": [[label(into.tokenizer, token), round(prob, 4)] for token, prob in top],
            "text": found.texts[r],
        }
        if found.expected_R is not None and found.expected_probs_R is not None:
            one["expected"] = label(lm.tokenizer, int(found.expected_R[r]))
            one["expected_prob"] = round(float(found.expected_probs_R[r]), 4)
            one["agrees"] = bool(found.top_ids_RK[r, 0] == found.expected_R[r])
        cells.append(one)
    labels = [label(lm.tokenizer, token) for token in tokens]
    return {
        "tokens": tokens,
        "labels": labels,
        "target_tokens": target.tokens,
        "target_labels": [label(into.tokenizer, token) for token in target.tokens],
        "target_position": target.position,
        "rows": rows,
        "columns": columns,
        "column_labels": [f"{labels[one]} {one}" for one in columns] if by_position else list(map(str, columns)),
        "cells": cells,
    }


def summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that go into the record."""
    cells = numbers["cells"]
    measured: dict[str, Any] = {"runs": len(cells), "target tokens": len(numbers["target_tokens"])}
    if "agrees" in cells[0]:
        measured["runs that say the source's next token"] = sum(cell["agrees"] for cell in cells)
        best = max(cells, key=lambda cell: cell["expected_prob"])
        measured["its highest probability"] = best["expected_prob"]
        measured["at"] = f"layer {best['layer']} into {best['target_layer']}, position {best['position']}"
    return measured


def strength(cell: dict[str, Any]) -> float:
    """What colours a cell."""
    return float(cell.get("expected_prob", cell["top"][0][1]))


def said(cell: dict[str, Any]) -> str:
    """What a cell shows: the text that was written, or the next token."""
    text = cell["text"].strip().replace("\n", "↵") or cell["top"][0][0]
    return text if len(text) <= SHORT else text[: SHORT - 1] + "…"


def page(numbers: dict[str, Any]) -> str:
    """patchscope.html: the grid, and under it every run in full."""
    nothing = {"text": "", "v": 0.0, "style": "", "title": "not run"}
    cells: list[list[dict[str, Any]]] = [[nothing] * len(numbers["columns"]) for _ in numbers["rows"]]
    known = "expected" in numbers["cells"][0]
    for cell in numbers["cells"]:
        value = strength(cell)
        title = f"{cell['text']}\n" if cell["text"] else ""
        title += ", ".join(f"{token} {prob:.2f}" for token, prob in cell["top"])
        title += f"\nthe source says {cell['expected']}: {cell['expected_prob']}" if known else ""
        style = "strong" if value > STRONG else ""
        cells[cell["row"]][cell["column"]] = {"text": said(cell), "v": round(value, 3), "style": style, "title": title}
    grid = {
        "title": "what the runs say",
        "note": f"source layer by {numbers['columns_are']}",
        "corner": "layer",
        "columns": numbers["column_labels"],
        "rows": numbers["rows"],
        "cells": cells,
    }
    colour = "the source model's own next token" if known else "the run's first token"
    facts = summary(numbers).items()
    return look_page("patchscope.html", grid=grid, colour=colour, known=known, facts=facts, **numbers)


def draw(numbers: dict[str, Any], path: Path) -> None:
    """The grid as a PNG."""
    rows, columns = len(numbers["rows"]), len(numbers["columns"])
    values, texts = np.full((rows, columns), np.nan), [[""] * columns for _ in range(rows)]
    for cell in numbers["cells"]:
        values[cell["row"], cell["column"]] = strength(cell)
        texts[cell["row"]][cell["column"]] = said(cell)
    figure = Figure(figsize=(max(3.4, 0.86 * columns + 0.8), 0.2 * rows + 1.3), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    axis.imshow(values, cmap=BLUES.with_extremes(bad="#ece9e3"), vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(texts):
        for x, text in enumerate(line):
            ink = "white" if values[y, x] > STRONG else INK
            axis.text(
                x, y, drawable(text), ha="center", va="center", fontsize=5, color=ink, family=MONO, parse_math=False
            )
    names = [drawable(name) for name in numbers["column_labels"]]
    axis.set_xticks(range(columns), names, rotation=40 * (numbers["across"] == "position"), parse_math=False)
    axis.set_yticks(range(rows), list(map(str, numbers["rows"])))
    axis.set_ylabel("source layer", fontsize=7, color=MUTED, family=FONT)
    axis.set_xlabel(numbers["columns_are"], fontsize=7, color=MUTED, family=FONT)
    models = f"{numbers['model']} into {numbers['into']}" if numbers["into"] else numbers["model"]
    title = f"{models}: {numbers['prompt'][-60:]!r}"
    axis.set_title(drawable(title), fontsize=7.5, color=INK, loc="left", family=FONT, parse_math=False)
    axis.tick_params(length=0, labelsize=6, colors=MUTED)
    for spine in axis.spines.values():
        spine.set_color(RULE)
    save_figure(figure, path)

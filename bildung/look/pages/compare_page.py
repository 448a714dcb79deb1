"""A comparison of two models as numbers (compare.json), as a few lines for the record, and as one offline page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from bildung.look import logit_lens
from bildung.look.comparing.comparison import Comparison
from bildung.look.lenses.token_difference import Top
from bildung.look.pages import lens_page
from bildung.look.pages.page import look_page

STRONG = 0.66  # from this strength of the colour on, the text takes the other ink (lens.js has the same number)
FEW = 32  # tokens: of fewer, CKA is mostly chance (two unrelated layers on 4 tokens: anything from -1 to 1)
SHOWN = 12  # heads and matrices in the lists of those that moved most


def as_json(
    found: Comparison, model: str, against: str, prompt: str | None, chat: bool, vocabulary: int
) -> dict[str, Any]:
    """Everything the page shows; lists are [layer][position or head]. Parts that were left out are missing."""
    numbers: dict[str, Any] = {"model": model, "against": against, "prompt": prompt, "chat": chat}
    numbers |= {"left_out": found.left_out, "on_more_text": _finite(found.on_more_text)}
    if (tokens := found.tokens) is not None:
        numbers["tokens"] = {
            "labels": tokens.labels,
            "kl": rounded(tokens.kl_L),
            "nats_a": rounded(tokens.nats_a_L),
            "nats_b": rounded(tokens.nats_b_L),
            "a": _top(tokens.a),
            "b": _top(tokens.b),
        }
    if (text := found.text) is not None:
        numbers["text"] = {
            "pieces": text.aligned.pieces,
            "tokens_a": [len(piece) for piece in text.aligned.a],
            "tokens_b": [len(piece) for piece in text.aligned.b],
            "nats_a": rounded(text.nats_a_P),
            "nats_b": rounded(text.nats_b_P),
            "a": _top(text.a),
            "b": _top(text.b),
        }
    if found.lens is not None:
        numbers["lens"] = logit_lens.as_json(found.lens, prompt or "", chat, vocabulary, model, against)
    if (heads := found.heads) is not None:
        numbers["heads"] = {name: rounded(score) for name, score in heads.differences.items()}
        numbers["behaviour"] = {name: [rounded(one) for one in pair] for name, pair in heads.behaviour.items()}
    if (alike := found.similarity) is not None:
        numbers["similarity"] = {
            "rows": alike.rows,
            "columns": alike.columns,
            "debiased": rounded(alike.debiased_NM),
            "biased": rounded(alike.biased_NM),
            "tokens": alike.tokens,
        }
    matrices = [_finite(asdict(one)) for one in found.weights.matrices]
    numbers["weights"] = {"matrices": matrices, "others": found.weights.others, "unlike": found.weights.unlike}
    numbers["patches"] = [
        {
            "site": grid.site,
            "across": grid.across,
            "metric": grid.question.name,
            "columns": grid.columns,
            "into": grid.into,
            "source": grid.source,
            "values": rounded(grid.values),
            "recovered": None if grid.recovered is None else rounded(grid.recovered),
        }
        for grid in found.patches
    ]
    return numbers


def summary(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers that go into the record, and above the page."""
    facts: dict[str, Any] = {}
    if (tokens := numbers.get("tokens")) is not None:
        kl, labels = tokens["kl"], tokens["labels"]
        most = max(range(len(kl)), key=lambda place: kl[place])
        facts["KL(A‖B), mean over the text, nats"] = sum(kl) / len(kl)
        facts["highest KL"] = f"{kl[most]:.3g} after {labels[most]} ({most})"
        facts["positions with another top token"] = sum(
            x[0][0] != y[0][0] for x, y in zip(tokens["a"], tokens["b"], strict=True)
        )
    if more := numbers["on_more_text"]:
        facts["KL(A‖B) on more text"] = f"{more['kl_mean']:.4g} over {more['tokens']} tokens"
    changed = [one for one in numbers["weights"]["matrices"] if one["norm"] > 0]
    facts["matrices changed"] = f"{len(changed)} of {len(numbers['weights']['matrices'])}"
    if changed:
        top = max(changed, key=lambda one: one["relative"])
        middle = sorted(one["effective_rank"] for one in changed)[len(changed) // 2]
        facts["most changed"] = f"{top['name']}: {100 * top['relative']:.3g} % of its norm"
        facts["effective rank of a change, median"] = middle
    if (heads := numbers.get("heads")) is not None:
        for name, said in (("moved", "looks"), ("written", "writes")):
            value, layer, head = _highest(heads[name])
            facts[f"head that {said} most differently"] = f"{layer}.{head}: {value:.3g}"
    if (alike := numbers.get("similarity")) is not None and alike["rows"] == alike["columns"]:
        least, name = min((row[n], alike["rows"][n]) for n, row in enumerate(alike["debiased"]))
        facts["least alike layer, CKA"] = f"{name}: {least:.4f}{_on(alike['tokens'])}"
    for grid in numbers["patches"]:
        if grid["recovered"] is not None:
            value, layer, column = _highest(grid["recovered"])
            facts[f"best patch, {grid['site']}"] = f"layer {layer}, {grid['columns'][column]}: {value:.3g}"
    return facts


def page(numbers: dict[str, Any], command: str) -> str:
    """compare.html. command: what makes it again."""
    shown = summary(numbers)
    has_lens = "lens" in numbers
    return look_page(
        "compare.html",
        script="lens.js" if has_lens else None,
        facts=[(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in shown.items()],
        command=command,
        strip=_strip(numbers),
        text=_text(numbers),
        lens_grids=lens_page.grids(numbers["lens"]) if has_lens else [],
        labels=numbers["lens"]["labels"] if has_lens else [],
        patches=[_patch(grid) for grid in numbers["patches"] if grid["recovered"] is not None],
        metrics=[(grid["metric"], grid["into"], grid["source"]) for grid in numbers["patches"][:1]],
        heads=_heads(numbers),
        movers=_movers(numbers),
        weights=_weights(numbers),
        similarity=_similarity(numbers),
        **({"data": numbers["lens"]} if has_lens else {}),
        **{key: numbers[key] for key in ("model", "against", "prompt", "chat", "left_out", "on_more_text")},
        **{key: numbers["weights"][key] for key in ("matrices", "others", "unlike")},
    )


def shaded(
    values: Sequence[Sequence[float | None]], show: str = "{:.2f}", signed: bool = False
) -> list[list[dict[str, Any]]]:
    """Cells of a table, coloured from 0 (pale) to the largest; signed: by size, below 0 in the other colour."""
    sizes = [abs(v) for row in values for v in row if v is not None]
    widest = max([*sizes, 1e-9])
    cells: list[list[dict[str, Any]]] = []
    for row in values:
        cells.append([])
        for value in row:
            v = 0.0 if value is None or (value < 0 and not signed) else abs(value) / widest
            style = ("minus" if signed and value is not None and value < 0 else "") + (" strong" if v > STRONG else "")
            cells[-1].append({"text": "" if value is None else show.format(value), "v": round(v, 3), "style": style})
    return cells


def _strip(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The text, token by token. Each is coloured by how far apart the predictions of what follows it are."""
    if (tokens := numbers.get("tokens")) is None:
        return []
    highest = max([*tokens["kl"], 1e-9])
    rows = []
    for place, text in enumerate(tokens["labels"]):
        kl, after = tokens["kl"][place], tokens["labels"][place + 1] if place + 1 < len(tokens["labels"]) else ""
        one = {"place": place, "text": text, "v": round(math.sqrt(kl / highest), 3), "kl": kl, "next": after}
        one |= {side: tokens[side][place] for side in "ab"}
        one |= {key: tokens[key][place] for key in ("nats_a", "nats_b")}
        rows.append(one)
    return rows


def _text(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pieces of a text in two tokenizers, coloured by which model was less surprised."""
    if (text := numbers.get("text")) is None:
        return []
    keys = ("pieces", "tokens_a", "tokens_b", "nats_a", "nats_b", "a", "b")
    rows = [dict(zip(keys, values, strict=True)) for values in zip(*(text[key] for key in keys), strict=True)]
    for row in rows:
        known = row["nats_a"] is not None and row["nats_b"] is not None
        row["gap"] = row["nats_b"] - row["nats_a"] if known else None
    widest = max([abs(row["gap"]) for row in rows if row["gap"] is not None] + [1e-9])
    return [row | {"v": round(abs(row["gap"] or 0) / widest, 3)} for row in rows]


def _patch(grid: Mapping[str, Any]) -> dict[str, Any]:
    rows = [str(layer) for layer in range(len(grid["recovered"]))]
    columns = "head" if grid["across"] == "head" else "position"
    note = f"share of the change that comes along, by layer and {columns}"
    return _table(grid["site"], note, rows, grid["columns"], shaded(grid["recovered"], signed=True), grid["values"])


def _heads(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    notes = {"moved": "share of its attention spent elsewhere in B", "written": "|r_B − r_A| / |r_A| of what it adds"}
    tables = []
    for name, values in numbers.get("heads", {}).items():
        rows, columns = [str(n) for n in range(len(values))], [str(h) for h in range(len(values[0]))]
        note = notes.get(name, "score of B minus score of A, on random tokens that come twice")
        tables.append(_table(name, note, rows, columns, shaded(values, signed=name not in notes)))
    return tables


def _movers(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The heads that write most otherwise, with all that is known of them."""
    if (heads := numbers.get("heads")) is None:
        return []
    places = [(layer, head) for layer, row in enumerate(heads["written"]) for head in range(len(row))]
    places.sort(key=lambda place: -heads["written"][place[0]][place[1]])
    return [
        {
            "head": f"{layer}.{head}",
            "moved": heads["moved"][layer][head],
            "written": heads["written"][layer][head],
            "behaviour": [(a[layer][head], b[layer][head]) for a, b in numbers["behaviour"].values()],
            "names": list(numbers["behaviour"]),
        }
        for layer, head in places[:SHOWN]
    ]


def _weights(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Relative change and effective rank, layers down, matrices across."""
    inside = [one for one in numbers["weights"]["matrices"] if one["layer"] is not None]
    if not any(one["norm"] > 0 for one in inside):
        return []
    kinds = list(dict.fromkeys(one["kind"] for one in inside))
    layers = sorted({one["layer"] for one in inside})
    at = {(one["layer"], one["kind"]): one for one in inside}
    tables = []
    for key, title, note, show in (
        ("relative", "Relative change", "|dW| / |W|, in percent", "{:.3g}"),
        ("effective_rank", "Effective rank", "of dW: in how many directions", "{:.1f}"),
        ("overlap_out", "Overlap, out", "of the directions dW writes to with those W writes most to", "{:.2f}"),
    ):
        scale = 100 if key == "relative" else 1
        found = [[at.get((layer, kind), {}).get(key) for kind in kinds] for layer in layers]
        values = [[None if value is None else scale * value for value in row] for row in found]
        tables.append(_table(title, note, list(map(str, layers)), kinds, shaded(values, show)))
    return tables


def _similarity(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    if (alike := numbers.get("similarity")) is None:
        return []
    note = f"debiased linear CKA{_on(alike['tokens'])}; down: layers of A, across: of B"
    cells = shaded(alike["debiased"])
    return [_table("CKA", note, alike["rows"], alike["columns"], cells, alike["biased"], "A")]


def _on(tokens: int) -> str:
    return f" on {tokens} tokens" + (", too few to say much: give --data" if tokens < FEW else "")


def _table(
    title: str,
    note: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: list[list[dict[str, Any]]],
    more: Sequence[Sequence[float]] | None = None,
    corner: str = "layer",
) -> dict[str, Any]:
    """more: a second number of each cell, shown when it is pointed at."""
    for n, row in enumerate(cells):
        for m, cell in enumerate(row):
            second = "" if more is None else f" ({more[n][m]:.4g})"
            cell["title"] = f"{title}, {corner} {rows[n]}, {columns[m]}: {cell['text']}{second}"
    return {"title": title, "note": note, "corner": corner, "rows": rows, "columns": columns, "cells": cells}


def _top(top: Top) -> list[list[tuple[str, float]]]:
    probs = rounded(top.probs_LK)
    return [list(zip(words, row, strict=True)) for words, row in zip(top.words, probs, strict=True)]


def _highest(rows: Sequence[Sequence[float]]) -> tuple[float, int, int]:
    return max((value, n, m) for n, row in enumerate(rows) for m, value in enumerate(row))


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in numbers.items()
    }


def rounded(numbers: Tensor) -> Any:
    """As lists, four digits; what is no number becomes None."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        return float(f"{value:.4g}") if math.isfinite(value) else None

    return walk(numbers.tolist())

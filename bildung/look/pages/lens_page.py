"""The logit lens as a page: the numbers of lens.json as a table of tokens, coloured, with details on every cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bildung.look.pages.page import look_page

STRONG = 0.66  # from this strength of the colour on, the text takes the other ink (lens.js has the same number)


def page(numbers: dict[str, Any], facts: Mapping[str, Any], command: str) -> str:
    """lens.html. `facts` are shown above the grid; `command` makes it again."""
    return look_page(
        "lens.html",
        script="lens.js",
        model=numbers["model"],
        against=numbers["against"],
        prompt=numbers["prompt"],
        chat=numbers["chat"],
        facts=[(name, f"{value:g}" if isinstance(value, float) else value) for name, value in facts.items()],
        labels=numbers["labels"],
        grids=grids(numbers),
        strip=_strip(numbers),
        strip_note=(
            "Underlined: where the two predictions of this token differ, KL(A‖B)."
            if "b" in numbers
            else "Underlined: how surprised the model was by the token, -ln p."
        ),
        in_place=numbers.get("in_place", False),
        command=command,
        data=numbers,
    )


def grids(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """What lens_grid.html draws: one table per model, and one of their difference."""
    tuned = dict(zip("ab", numbers.get("tuned", (False, False)), strict=True))
    names = [
        (key, (f"{key.upper()}  {name}" if "b" in numbers else name) + (", tuned lens" if tuned[key] else ""))
        for key, name in _models(numbers)
    ]
    shown = [
        {"key": key, "title": title, "note": "top token of every layer", "rows": _cells(numbers, key), "versus": False}
        for key, title in names
    ]
    if "b" in numbers:
        note = "KL(A‖B) at each layer; A → B where the top tokens differ, framed where they first do"
        shown.append({"key": "", "title": "Difference", "note": note, "rows": _versus(numbers), "versus": True})
    return shown


def _models(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    return [("a", numbers["model"])] + ([("b", numbers["against"])] if "b" in numbers else [])


def _cells(numbers: dict[str, Any], key: str) -> list[list[dict[str, Any]]]:
    side, words = numbers[key], numbers["words"]
    return [
        [
            {"text": words[str(i[0])], "v": round(p[0], 3), "style": "strong" if p[0] > STRONG else ""}
            for i, p in zip(ids, probs, strict=True)
        ]
        for ids, probs in zip(side["top_ids"], side["top_probs"], strict=True)
    ]


def _versus(numbers: dict[str, Any]) -> list[list[dict[str, Any]]]:
    highest = max(max(row) for row in numbers["kl_ab"]) or 1.0
    rows = []
    for n, row in enumerate(numbers["kl_ab"]):
        cells = []
        for i, kl in enumerate(row):
            a, b = (numbers["words"][str(numbers[key]["top_ids"][n][i][0])] for key in "ab")
            style = ["same"] if a == b else ["first"] if numbers["first_difference"][i] == n else []
            style += ["strong"] if kl / highest > STRONG else []
            text = f"{a} → {b}" if a != b else f"{kl:.2f}"
            cells.append({"text": text, "v": round(kl / highest, 3), "style": " ".join(style)})
        rows.append(cells)
    return rows


def _strip(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """The text, token by token; each is coloured by what was predicted at the position before it (or at its own)."""
    strip, labels = [], numbers["labels"]
    if not numbers.get("in_place", False):
        strip, labels = [{"text": labels[0], "v": 0, "title": "the first token is not predicted"}], labels[1:]
    for i, text in enumerate(labels):
        p = {key: numbers[key]["next_probs"][-1][i] for key, _ in _models(numbers)}
        title = ", ".join(f"p{'_' + key.upper() if len(p) > 1 else ''} {value:.3g}" for key, value in p.items())
        if "b" in numbers:
            kl = numbers["kl_ab"][-1][i]
            v = round(math.sqrt(kl / (max(numbers["kl_ab"][-1]) or 1.0)), 3)
            strip.append({"text": text, "v": v, "title": f"{title}, KL(A‖B) {kl:.3g}"})
        else:
            surprise = min(-math.log(max(p["a"], 1e-9)) / 10, 1.0)
            strip.append({"text": text, "v": round(surprise, 3), "title": title})
    return strip

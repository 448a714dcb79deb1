"""The curve of `tune by_examples`: its numbers with their errors, a picture, and the page of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.look.pages.page import data_url, look_page

WAYS = ("generative", "discriminative")
Key = tuple[str, int, int]  # way, examples, round


def point(done: Mapping[Key, dict[str, Any]], size: int) -> dict[str, Any]:
    """Accuracy of both ways with so many examples, and their difference."""
    found: dict[str, Any] = {"examples": size}
    rounds = {
        way: [one["right"] for key, one in sorted(done.items()) if key[:2] == (way, size)] for way in WAYS
    }  # way -> round -> N
    for way, right in rounds.items():
        if right:
            found[way], found[f"{way}_stderr"] = mean_and_error(right)
            found[f"{way}_rounds"] = [share(one) for one in right]
    if all(rounds.values()):
        pairs = zip(rounds["generative"], rounds["discriminative"], strict=True)
        ahead = [[a - b for a, b in zip(one, other, strict=True)] for one, other in pairs]
        found["difference"], found["difference_stderr"] = mean_and_error(ahead)
    return found


def mean_and_error(rounds: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(mean, standard error over texts and rounds) of values by round and text."""
    per_text = [sum(column) / len(rounds) for column in zip(*rounds, strict=True)]
    per_round = [share(one) for one in rounds]
    return share(per_text), math.sqrt(_variance_of_mean(per_text) + _variance_of_mean(per_round))


def _variance_of_mean(values: Sequence[float]) -> float:
    n, mean = len(values), share(values)
    return sum((value - mean) ** 2 for value in values) / (n - 1) / n if n > 1 else 0.0


def share(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def shown(found: dict[str, Any]) -> list[str]:
    """A line per number of examples."""
    lines = [f"{'examples':>8}  {'generative':>15}  {'discriminative':>15}  {'difference':>16}"]
    for one in found["points"]:
        cells = [_cell(one, name) for name in (*WAYS, "difference")]
        lines.append(f"{one['examples']:>8,}  {cells[0]:>15}  {cells[1]:>15}  {cells[2]:>16}")
    return [*lines, f"always the most frequent class: {found['most_frequent']:.3f}"]


def _cell(one: dict[str, Any], name: str) -> str:
    sign = "+" if name == "difference" else ""
    return f"{one[name]:{sign}.3f} ± {one[f'{name}_stderr']:.3f}" if name in one else "–"


def write_page(out: Path, model: str, found: dict[str, Any], template: str, words: Sequence[str], command: str) -> None:
    """curve.png and index.html in `out`."""
    draw(found, out / "curve.png")
    rows = [[f"{one['examples']:,}", *(_cell(one, name) for name in (*WAYS, "difference"))] for one in found["points"]]
    page = look_page(
        "by_examples.html",
        model=model,
        command=command,
        facts={"data": found["data"], "test texts": f"{found['test_texts']:,}", "words": ", ".join(words)},
        prompt=template,
        picture=data_url(out / "curve.png"),
        rows=rows,
        most_frequent=f"{found['most_frequent']:.3f}",
    )
    (out / "index.html").write_text(page, encoding="utf-8")


def draw(found: dict[str, Any], path: Path) -> None:
    """Accuracy over the number of examples, with a band of one standard error."""
    learned = [one for one in found["points"] if one["examples"]]
    places = [one["examples"] for one in learned]
    lines: dict[str, Any] = {way: (places, [one[way] for one in learned]) for way in WAYS}
    errors = {way: [one[f"{way}_stderr"] for one in learned] for way in WAYS}
    ends = [places[0], places[-1]]
    for one in found["points"]:
        if not one["examples"]:
            lines["words, untrained"] = (ends, [one["generative"]] * 2)
    lines["most frequent"] = (ends, [found["most_frequent"]] * 2)
    draw_lines([Panel("accuracy by number of examples", "labelled examples", lines, log_x=True, errors=errors)], path)

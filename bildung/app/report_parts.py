"""What a report says about one operation, as plain values for the page: numbers become texts here, words stay there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bildung.app.cards import Change, changes_of, differences_of
from bildung.app.chapters import Chapter, card_tasks, changed_settings, is_number, read_log
from bildung.core import chart
from bildung.core.progress import duration, size
from bildung.look.pages import lens_page
from bildung.look.pages.page import data_url

Values = dict[str, Any]
SMOOTHED = 60  # a curve of more points than this is drawn smoothed, over the raw one
# Columns of metrics.jsonl that count or control and are no result.
NOT_SHOWN = {"step", "tokens", "targets", "seconds", "seconds_left", "epoch", "lr", "learning_rate", "grad_norm"}
NOT_SHOWN |= {"tokens_per_second", "flops_utilisation"}
# Names in records, as people say them. evaluate.compare.model_difference calls the original a, what became of it b.
WORDS = {
    "kl_mean": "KL divergence, mean (nats)",
    "kl_stderr": "its standard error",
    "kl_median": "KL divergence, median",
    "kl_999": "KL divergence, 99.9 % quantile",
    "same_top": "same top token",
    "max_logit_difference": "largest logit difference",
    "perplexity_a": "perplexity before",
    "perplexity_b": "perplexity after",
    "loss_first": "loss, first tenth",
    "loss_last": "loss, last tenth",
}


def chapter_values(chapter: Chapter, out: Path) -> Values:
    """Everything about one operation. `out`: where the report will lie, for links."""
    record = chapter.record
    changed, same, doubt = changed_settings(record)
    curves = loss_curves(read_log(chapter))
    return {
        "number": chapter.number,
        "name": chapter.name,
        "operation": record.operation,
        "parent": chapter.parent and {"number": chapter.parent.number, "name": chapter.parent.name},
        "elsewhere": record.source["path"] if record.source and chapter.parent is None else None,
        "companions": {name: model["path"] for name, model in record.companions.items()},
        "costs": costs(chapter),
        "changed": {name: text_of(value) for name, value in changed.items()},
        "same": {name: text_of(value) for name, value in same.items()},
        "doubt": doubt,
        "rows": rows_of(changes_of({"before": record.before, "after": record.after}), record.before, record.after),
        "both": bool(record.before["tasks"] and record.after["tasks"]),
        "verdict": verdict(changes_of({"before": record.before, "after": record.after})),
        "same_way": record.before.get("fingerprint") == record.after.get("fingerprint"),
        "curves": curves,
        "facts": facts(record.measured),
        "answers": measured_answers(record.measured),
        "samples": sample_pairs(record.before, record.after),
        "look": look_values(chapter, out),
        "notes": [*record.notes, *map(str, record.after.get("notes") or [])],
        "missing": chapter.missing,
    }


def costs(chapter: Chapter) -> Values:
    """Time, memory, bytes and tokens, for people; the bare numbers for sums and bars."""
    record = chapter.record
    return {
        "seconds": record.seconds,
        "time": duration(record.seconds),
        "memory": size(record.peak_bytes),
        "accelerator": size(record.accelerator_peak_bytes) if record.accelerator_peak_bytes else "",
        "disk": size(chapter.bytes_on_disk) if record.files else "not recorded",
        "seen": f"{record.tokens_seen:,}" if record.tokens_seen else "",
        "trained": f"{record.trained_tokens:,}" if record.trained_tokens else "",
    }


def rows_of(changes: list[Change], before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Values]:
    """The before/after table."""
    rows = []
    for change in changes:
        one, other = (card.get("tasks", {}).get(change.task, {}) for card in (before, after))
        counts = list(dict.fromkeys(str(task["n"]) for task in (one, other) if task.get("n") is not None))
        row: Values = {"task": change.task, "metric": change.metric, "n": " / ".join(counts)}
        row |= {"before": with_error(one), "after": with_error(other), "difference": "", "bar": "", "verdict": ""}
        if change.difference is not None:
            row["difference"] = value_and_error(change.difference, change.stderr, "+")
            row["verdict"] = "not paired"
            if change.stderr is not None:
                row["verdict"] = {True: "better", False: "worse", None: "unclear"}[change.better]
                errors = change.difference / change.stderr if change.stderr else 0.0
                # Right is better for every task, whichever way its metric runs.
                row["bar"] = chart.difference_bar(errors if change.higher_is_better else -errors, change.better)
        rows.append(row)
    return rows


def verdict(changes: list[Change]) -> list[tuple[str, int]]:
    """[("better", 3), ("worse", 1), ("unclear", 2)] of the tasks measured twice."""
    known = [change.better for change in changes if change.difference is not None and change.stderr is not None]
    counted = [("better", known.count(True)), ("worse", known.count(False)), ("unclear", known.count(None))]
    return [(word, number) for word, number in counted if number]


def whole_life(first: Chapter, last: Chapter) -> Values:
    """What lies between the first and the last model of a line."""
    changes = differences_of(first.record.after, last.record.after)
    return {
        "first": first.name,
        "last": last.name,
        "rows": rows_of(changes, first.record.after, last.record.after),
        "verdict": verdict(changes),
        "same_way": first.record.after.get("fingerprint") == last.record.after.get("fingerprint"),
        "samples": sample_pairs(first.record.after, last.record.after),
    }


def loss_curves(rows: list[dict[str, float]]) -> list[Values]:
    """One chart for the loss and its held-out twin, one for each further measure."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    charts = []
    for name in [n for n in names if n not in NOT_SHOWN and not n.startswith("held_out_")]:
        points = [(row["step"], row[name]) for row in rows if name in row]
        curves = [chart.Curve(name, points)]
        title = name.replace("_", " ")
        if len(points) > SMOOTHED:
            window = max(5, len(points) // 20)
            curves = [chart.Curve(name, points, "raw"), chart.Curve("training", chart.smooth(points, window))]
            title += f" (thick: mean of {window} steps)"
        held_out = [(row["step"], row[f"held_out_{name}"]) for row in rows if f"held_out_{name}" in row]
        if held_out:
            curves.append(chart.Curve("held out", held_out, "second"))
        charts.append({"title": title, "drawing": chart.line_chart(title, curves)})
    return charts


def states(chapters: list[Chapter], line: list[Chapter]) -> list[Values]:
    """A small multiple for each task: every model of the life on the same scale, those off the main line paler."""
    tasks = dict.fromkeys(task for chapter in chapters for task in card_tasks(chapter))
    made = []
    for task in tasks:
        having = [chapter for chapter in chapters if task in card_tasks(chapter)]
        entries = [card_tasks(chapter)[task] for chapter in having]
        points = [
            chart.State(c.number, c.name, e["value"], e.get("stderr"), _measured_parent(c, having), c not in line)
            for c, e in zip(having, entries, strict=True)
        ]
        up = entries[0].get("higher_is_better")
        note = "" if up is None else "higher is better" if up else "lower is better"
        note = ", ".join(part for part in (str(entries[0].get("metric", "")), note) if part)
        made.append({"task": task, "note": note, "drawing": chart.states_chart(f"{task} along the life", points)})
    return made


def _measured_parent(chapter: Chapter, having: list[Chapter]) -> int | None:
    parent = chapter.parent
    while parent is not None and parent not in having:
        parent = parent.parent
    return parent.number if parent else None


def sample_pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Values]:
    """The answers to the same prompts, before and after."""
    old, new = ({s["prompt"]: s["answer"] for s in _samples(card)} for card in (before, after))
    return [
        {
            "prompt": prompt,
            "answer": new.get(prompt, old.get(prompt)),
            "before": old.get(prompt),
            "after": new.get(prompt),
        }
        for prompt in {**new, **old}
    ]


def measured_answers(measured: Mapping[str, Any]) -> list[Values]:
    """Conversations that the operation itself recorded (`chat` with prompts)."""
    found = [one for value in measured.values() if isinstance(value, list) for one in _samples({"samples": value})]
    return [{"prompt": one["prompt"], "answer": text_of(one["answer"])} for one in found]


def _samples(card: Mapping[str, Any]) -> list[Values]:
    given = card.get("samples")
    given = given if isinstance(given, list) else []
    return [s for s in given if isinstance(s, Mapping) and {"prompt", "answer"} <= s.keys()]  # type: ignore[misc]


def facts(measured: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Single values as (name, text); those of a group follow its name. Lists are shown elsewhere or not at all."""
    shown = []
    for name, value in measured.items():
        title = prefix + WORDS.get(name, str(name).replace("_", " "))
        if isinstance(value, Mapping):
            shown += facts(value, f"{title}: ")
        elif not isinstance(value, list):
            shown.append((title, _measure(title, value)))
    return shown


def _measure(title: str, value: Any) -> str:
    if is_number(value) and "bytes" in title:
        return size(value)
    if is_number(value) and title.endswith("seconds"):
        return duration(value)
    return text_of(value)


def text_of(value: Any) -> str:
    """A value of any kind for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if is_number(value):
        return chart.short(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def with_error(task: Mapping[str, Any]) -> str:
    """ "24.1 ± 1.2", "" for a task that was not measured."""
    return value_and_error(task["value"], task.get("stderr")) if task else ""


def value_and_error(value: float, error: Any, sign: str = "") -> str:
    """Both to the digit at which the error has its second: no digit that means nothing."""
    if not is_number(error) or error <= 0:
        text = f"{value:{sign}.4g}" if value else "0"
    else:
        digits = max(0, 1 - math.floor(math.log10(error)))
        text = f"{value:{sign},.{digits}f} ± {error:,.{digits}f}"
    return text.replace("-", "−")


def look_values(chapter: Chapter, out: Path) -> Values | None:
    """The grid or the picture of a look, and the way to its own page."""
    directory = chapter.directory
    made: Values = {"page": "", "picture": "", "grids": [], "labels": [], "prompt": ""}
    for name in ("lens", "attention"):
        if (directory / f"{name}.html").is_file():
            made["page"] = quote(os.path.relpath(directory / f"{name}.html", out))
        if (directory / f"{name}.png").is_file():
            made["picture"] = data_url(directory / f"{name}.png")
    if (directory / "lens.json").is_file():
        try:
            numbers = json.loads((directory / "lens.json").read_text(encoding="utf-8"))
            made |= {"grids": lens_page.grids(numbers), "labels": numbers["labels"], "prompt": numbers["prompt"]}
        except (ValueError, KeyError, TypeError, IndexError):
            chapter.missing.append("lens.json cannot be read; the picture is shown instead.")
    if chapter.record.operation.startswith("look ") and not (made["grids"] or made["picture"]):
        chapter.missing.append("It is a look, but neither its numbers nor its picture are there.")
    made["prompt"] = made["prompt"] or text_of(chapter.record.settings.get("prompt", ""))
    return made if made["grids"] or made["picture"] else None

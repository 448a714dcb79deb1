"""A life read back from its directories: one chapter per operation, each after the one it started from.

Records and logs are read as they are found. What is missing or cannot be used is noted in the chapter, so that a report
says it instead of hiding it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from bildung.core.errors import RecordError
from bildung.core.record import Record, read_record
from bildung.core.verbs import Verb, verbs

METRICS = "metrics.jsonl"


@dataclasses.dataclass
class Chapter:
    """One operation and the directory it made."""

    directory: Path
    record: Record
    number: int = 0  # from 1, in reading order
    parent: Chapter | None = None  # what it started from, when that is part of the life
    children: list[Chapter] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)  # what the report cannot show, in sentences

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.name

    @property
    def bytes_on_disk(self) -> int:
        """Of all files that the operation left."""
        return sum(file.get("bytes", 0) for file in self.record.files.values())

    def __len__(self) -> int:
        return 1 + sum(len(child) for child in self.children)


def find_directories(places: Iterable[Path], leave_out: Iterable[Path] = ()) -> list[Path]:
    """The directories with a record: the places themselves, or else their children. Raises RecordError for none."""
    skipped, found = {path.resolve() for path in leave_out}, {}
    places = list(places)
    for place in places:
        whole = [place] if (place / "record.json").is_file() else sorted(place.glob("[!.]*/record.json"))
        for path in whole:
            directory = path.parent if path.name == "record.json" else path
            if directory.resolve() not in skipped and not directory.name.endswith(".partial"):
                found[directory.resolve()] = directory
    if not found:
        raise RecordError(
            f"no record.json in {', '.join(map(str, places))} or in the directories there: nothing to report on. Give "
            "the directory of a life, or directories that bildung made."
        )
    return list(found.values())


def read_life(directories: Iterable[Path]) -> list[Chapter]:
    """The chapters in reading order: a branch that leads nowhere stands right after what it came from, then the life
    goes on. Reports themselves are left out. Raises RecordError for a record that cannot be read."""
    chapters = {}
    for directory in directories:
        record = read_record(directory)
        if record is not None and record.operation != "report":
            chapters[directory.resolve()] = Chapter(directory, record)
    for place, chapter in chapters.items():
        _check(chapter)
        source = chapter.record.source
        parent = chapters.get((place / source["path"]).resolve()) if source else None
        # A circle can only be made by hand; it is cut, or the life would have no beginning.
        if parent is not None and chapter not in _line(parent):
            chapter.parent = parent
            parent.children.append(chapter)
    ordered: list[Chapter] = []
    for root in sorted((c for c in chapters.values() if c.parent is None), key=_when):
        _walk(root, ordered)
    for number, chapter in enumerate(ordered, 1):
        chapter.number = number
    return ordered


def main_line(chapters: list[Chapter]) -> list[Chapter]:
    """From the beginning to the model that the life was for: the measured one that was talked to in the end. Where none
    was, the last of the longest line. Other models of the life are its branches."""
    measured = [chapter for chapter in chapters if card_tasks(chapter)]
    partners = [chapter.parent for chapter in chapters if chapter.record.operation == "chat"]
    ends = [chapter for chapter in measured if chapter in partners] or measured
    return max((_line(end)[::-1] for end in ends), key=lambda line: (len(line), _when(line[-1])), default=[])


def card_tasks(chapter: Chapter) -> dict[str, Any]:
    """{task: measured} of the model that the chapter made."""
    return dict(chapter.record.after.get("tasks", {}))


def changed_settings(record: Record) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(those that differ from the defaults, the others, why they could not be told apart or "")."""
    verb = _verbs().get(record.operation)
    if verb is None or not verb.is_operation:
        return record.settings, {}, f"this version of bildung has no operation {record.operation!r}: all are shown"
    defaults = {}
    for field in dataclasses.fields(verb.load().Settings):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = to_jsonable_python(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = to_jsonable_python(field.default_factory())
    nothing = object()
    same = {name: value for name, value in record.settings.items() if defaults.get(name, nothing) == value}
    return {name: value for name, value in record.settings.items() if name not in same}, same, ""


@cache
def _verbs() -> dict[str, Verb]:
    return verbs()  # reads every file of the package: once is enough


def read_log(chapter: Chapter) -> list[dict[str, float]]:
    """The numbers of metrics.jsonl, a row per step; what cannot be used is noted in the chapter."""
    path = chapter.directory / METRICS
    if not path.is_file():
        if chapter.record.trained_tokens:
            chapter.missing.append(f"It trained, but {METRICS} is not there: no loss curve.")
        return []
    rows, unusable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, Mapping) and is_number(row.get("step")):
            rows.append({str(name): float(value) for name, value in row.items() if is_number(value)})
        else:
            unusable += 1
    if unusable:
        chapter.missing.append(f"{unusable} lines of {METRICS} cannot be read and are left out.")
    return rows


def is_number(value: Any) -> bool:
    """A finite number (True is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(chapter: Chapter) -> None:
    """Notes what the record lacks, and takes tasks out of its cards that have no usable number."""
    record = chapter.record
    for when, card in (("before", record.before), ("after", record.after)):
        tasks = card.get("tasks", {})
        tasks = tasks if isinstance(tasks, Mapping) else {}
        good = {
            name: task for name, task in tasks.items() if isinstance(task, Mapping) and is_number(task.get("value"))
        }
        if bad := [str(name) for name in tasks if name not in good]:
            chapter.missing.append(f"No number was measured {when} the operation for {', '.join(bad)}.")
        card["tasks"] = good
        for task, why in dict(card.get("skipped") or {}).items():
            chapter.missing.append(f"{task} was not measured {when} the operation: {why}")
    makes_a_model = {"config.json", "adapter_config.json"} & record.files.keys()
    if makes_a_model and not record.before["tasks"] and not record.after["tasks"]:
        chapter.missing.append("No card was measured before or after: what it did to the model's abilities is unknown.")


def _line(chapter: Chapter) -> list[Chapter]:
    line = [chapter]
    while line[-1].parent is not None:
        line.append(line[-1].parent)
    return line


def _walk(chapter: Chapter, ordered: list[Chapter]) -> None:
    ordered.append(chapter)
    chapter.children.sort(key=lambda child: (len(child), _when(child)))
    for child in chapter.children:
        _walk(child, ordered)


def _when(chapter: Chapter) -> tuple[str, str]:
    return chapter.record.started, chapter.name

"""record.json: what an operation did, on what, at what cost, and what it changed; it lies beside config.json.

A directory with a record is finished: the record is written last (core/operation.py). Records chain: `ancestors` holds
the records of everything the model went through before, without their bulky parts, so a model tells its whole life even
when the directories of its youth are gone.

A directory is identified by `hash_directory`, the hash of its model files. Hashing gigabytes takes seconds, so the
record remembers size and modification time of every file it hashed, and only files that look touched are hashed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from bildung.core.errors import RecordError
from bildung.core.settings import explain

RECORD = "record.json"


@dataclass(kw_only=True, config=ConfigDict(extra="forbid"))
class Record:
    """One operation. Paths of directories are relative to the directory of the record, so a life can be moved whole."""

    operation: str  # "tune lora"
    settings: dict[str, Any]  # all of them, defaults included
    source: dict[str, str] | None = None  # {"path", "hash"} of the model it started from
    companions: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)  # {name: {"path", "hash"}}
    data: dict[str, str] = dataclasses.field(default_factory=dict)  # {name of data read: sha256}
    seed: int | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    hardware: dict[str, Any] = dataclasses.field(default_factory=dict)
    started: str = ""  # ISO 8601, UTC
    seconds: float = 0.0
    peak_bytes: int = 0  # highest resident memory of the process
    accelerator_peak_bytes: int = 0
    tokens_seen: int = 0
    trained_tokens: int = 0  # those of them that carried loss
    before: dict[str, Any] = dataclasses.field(default_factory=dict)  # cards, see evaluate/card.py
    after: dict[str, Any] = dataclasses.field(default_factory=dict)
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)  # what this operation alone measures
    notes: list[str] = dataclasses.field(default_factory=list)
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # {name: {bytes, sha256, mtime_ns}}
    fingerprint: str = ""  # hash of the inputs, see core/operation.py
    ancestors: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # oldest first


def read_record(directory: Path) -> Record | None:
    """The record of `directory`, None when it has none. Raises RecordError when it cannot be read or is not one."""
    path = Path(directory) / RECORD
    if not path.is_file():
        return None
    remedy = "Restore it, or delete the directory and make it anew."
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8
        raise RecordError(f"{path} cannot be read: {error}. {remedy}") from None
    if not isinstance(content, dict):
        raise RecordError(f"{path} holds a {type(content).__name__}, not a record. {remedy}")
    try:
        record = Record(**content)
        # Those of older versions lack some fields; all of a record's get their defaults here.
        record.ancestors = [as_ancestor(Record(**ancestor)) for ancestor in record.ancestors]
    except ValidationError as error:
        raise RecordError(f"{path} is not a record: {explain(error, Record)}. {remedy}") from None
    if wrong := next(filter(None, map(_wrong, [dataclasses.asdict(record), *record.ancestors])), ""):
        raise RecordError(f"{path} is not a record: {wrong}. {remedy}")
    return record


def _wrong(record: Mapping[str, Any]) -> str:
    """What is amiss inside the dictionaries of a record, "" when nothing is."""
    for name, place in {
        **record["companions"],
        **({"source": record["source"]} if record["source"] is not None else {}),
    }.items():
        if not {"path", "hash"} <= place.keys():
            return f"{name} has no path and hash, only {place}"
    for name, file in record.get("files", {}).items():
        if not isinstance(file.get("bytes"), int) or not isinstance(file.get("sha256"), str):
            return f"the file {name} has no bytes and sha256, only {file}"
    for side in ("before", "after"):
        tasks = record[side].get("tasks", {})
        if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
            return f"the tasks of its card {side!r} are not a mapping of mappings"
        for name, task in tasks.items():
            if not isinstance(task.get("value"), int | float | None):
                return f"the value of {name} in its card {side!r} is {task['value']!r}, no number"
    return ""


def write_record(directory: Path, record: Record) -> None:
    """Writes record.json whole or not at all. Numbers that are not finite become null: JSON has no word for them."""
    text = json.dumps(_finite(dataclasses.asdict(record)), indent=1, ensure_ascii=False, allow_nan=False)
    temporary = Path(directory) / f".{RECORD}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(Path(directory) / RECORD)


def as_ancestor(record: Record) -> dict[str, Any]:
    """A record as its descendants keep it: without its own ancestors, its files and the single items of its cards."""
    kept = dataclasses.asdict(record)
    del kept["ancestors"], kept["files"]
    for card in (kept["before"], kept["after"]):
        card.pop("samples", None)
        for task in card.get("tasks", {}).values():
            task.pop("items", None)
    return kept


def hash_file(path: Path) -> str:
    """sha256 of the bytes of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_directory(directory: Path) -> str:
    """sha256 over the names and contents of the files that make the model, wherever the directory lies.

    Left out: the record itself, logs (*.jsonl), pages (*.html) and hidden files; they may differ between two runs
    that made the same model. A single file (.gguf) may be given too.
    """
    directory = Path(directory)
    if directory.is_file():
        return hash_file(directory)
    record = read_record(directory)
    known = record.files if record else {}
    return combine({name: _hash_known(directory / name, known.get(name)) for name in model_files(directory)})


def combine(hashes: Mapping[str, str]) -> str:
    """One sha256 for {name: sha256}."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def model_files(directory: Path) -> list[str]:
    """Relative names of the files that count for `hash_directory`."""
    return [name for name in all_files(directory) if name != RECORD and not name.endswith((".jsonl", ".html"))]


def all_files(directory: Path) -> list[str]:
    """Relative names of all files below `directory`, sorted; hidden ones (".name") are scratch, no part of it."""
    names = []
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names += [(Path(folder) / name).relative_to(directory).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """{name: {bytes, sha256, mtime_ns}} of every file in `directory`, for `Record.files`."""
    described = {}
    for name in all_files(directory):
        status = (directory / name).stat()
        sha256 = hash_file(directory / name)
        described[name] = {"bytes": status.st_size, "sha256": sha256, "mtime_ns": status.st_mtime_ns}
    return described


def damage(directory: Path, record: Record) -> str:
    """What is wrong with the files the record speaks of, as a phrase; "" when all are there and unchanged."""
    for name, file in record.files.items():
        path = Path(directory) / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["bytes"] or _hash_known(path, file) != file["sha256"]:
            return f"{name} was altered"
    return ""


def _hash_known(path: Path, known: Mapping[str, Any] | None) -> str:
    """The hash of a file, believed from the record when size and modification time are those it was recorded with."""
    status = path.stat()
    if known and (status.st_size, status.st_mtime_ns) == (known.get("bytes"), known.get("mtime_ns")):
        return str(known["sha256"])
    return hash_file(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

"""`perform`: the one way anything is made. It decides whether to work, guards the place, and leaves a record.

    inputs      operation + resolved settings + hashes of source, companions and data   ->  fingerprint
    out         holds a record with this fingerprint: up to date, returned untouched
    out.partial where the work writes. Kept after a kill, and after an error where there is work to go on from, so the
                work finds its checkpoint when it is run again with the same inputs; thrown away (and said so) when the
                inputs are others
    out         appears by one rename, after record.json, the last file, is on the disk

So `out` either is complete or does not exist, whatever dies in between: the process, the machine, the disk's space.
How that is done is in core/staging.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bildung.core import ranks
from bildung.core.errors import OutputError
from bildung.core.foretold import ask
from bildung.core.hardware import PeakMemory, hardware, versions
from bildung.core.inputs import changed, fingerprint, identify
from bildung.core.record import (
    Record,
    as_ancestor,
    damage,
    describe_files,
    read_record,
    write_record,
)
from bildung.core.settings import as_dict
from bildung.core.staging import check_name, goes_on, place_of_work, publish, staging_of, to_disk, was_interrupted


class OccupiedError(OutputError):
    """`out` holds the finished result of other inputs: running with `force` replaces it."""


@dataclasses.dataclass
class Job:
    """What the work of an operation gets to read (first four) and to fill in; the rest of the record writes itself."""

    operation: str
    source: Path | None
    out: Path  # the place of work; may hold the checkpoint of an interrupted run
    settings: Any
    source_record: Record | None = None
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    after: dict[str, Any] = dataclasses.field(default_factory=dict)
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    tokens_seen: int = 0
    trained_tokens: int = 0


def perform(
    operation: str,
    source: Path | None,
    out: Path,
    settings: Any,
    work: Callable[[Job], None],
    *,
    data: Mapping[str, str] | None = None,
    companions: Mapping[str, Path] | None = None,
    force: bool = False,
) -> Record:
    """Makes `out` by `work`, or finds it up to date; returns its record.

    data        {name: sha256} of what is read besides models (data.sources.fingerprint)
    companions  {name: directory} of other models that take part (a reference, a teacher)
    settings    may have a method `decisive`: of settings as a dictionary, those that decide the result
    force       work even when `out` is up to date, and replace the bildung result that `out` holds
    Raises OutputError when `out` is occupied, being written by another process, or the disk is full.
    """
    out = Path(out)
    check_name(out)
    inputs: dict[str, Any] = {
        "operation": operation,
        "settings": as_dict(settings),
        "source": identify(source, out),
        "companions": {name: identify(path, out) for name, path in (companions or {}).items()},
        "data": dict(data or {}),
    }
    source_record = read_record(source) if source is not None else None
    if ranks.rank() > 0:
        return _help(Job(operation, source, staging_of(out), settings, source_record), out, work)
    if (made := _up_to_date(out, inputs, force)) is not None:
        ranks.told("up to date")
        return made
    with place_of_work(out, inputs, getattr(settings, "decisive", dict)) as staging:
        made = _finished(staging, inputs)
        ranks.told("work" if made is None else "only publish")
        if made is None:
            made = _work(Job(operation, source, staging, settings, source_record), inputs, work)
        publish(staging, out)
    ranks.told("published")
    return made


def _help(job: Job, out: Path, work: Callable[[Job], None]) -> Record:
    """What the ranks above 0 do: the work, but neither decide nor write. What they find, rank 0 finds and says."""
    said = ranks.told()
    if said == "work":
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            work(job)
    if said != "up to date":
        ranks.told()  # wait until it is published
    made = read_record(out)
    if made is None:
        raise OutputError(f"{out} has no record after the work of rank 0; look at its messages.")
    return made


def _up_to_date(out: Path, inputs: dict[str, Any], force: bool) -> Record | None:
    """The record of `out` when nothing is to be done, None when the way is free; OutputError when it is not."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    record = read_record(out) if out.is_dir() else None
    if record is None:
        raise OutputError(
            f"{out} is there already and was not made by bildung (no record.json). It is left as it is; "
            "choose another place or move it away"
        )
    if force:
        return None
    if record.fingerprint == fingerprint(inputs):
        if what := damage(out, record):
            raise OccupiedError(f"{out} contradicts its record: {what}. --force makes it anew")
        return record
    shown = "; ".join(changed({name: getattr(record, name) for name in inputs}, inputs)) or "other inputs"
    raise OccupiedError(f"{out} holds the result of something else ({shown}). --force replaces it")


def _work(job: Job, inputs: dict[str, Any], work: Callable[[Job], None]) -> Record:
    """Runs the work and writes the record, the sign that the place of work is complete."""
    if was_interrupted(job.out):
        job.notes.append(goes_on(job.out, inputs))
    foretold = ask(job.source)
    started, start = datetime.datetime.now(datetime.UTC), time.monotonic()
    with PeakMemory() as peak:
        work(job)
    parent = job.source_record
    record = Record(
        **inputs,
        fingerprint=fingerprint(inputs),
        seed=getattr(job.settings, "seed", None),
        versions=versions(),
        hardware=hardware(),
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 3),
        peak_bytes=peak.bytes,
        accelerator_peak_bytes=peak.accelerator_bytes,
        tokens_seen=job.tokens_seen,
        trained_tokens=job.trained_tokens,
        before=job.before,
        after=job.after,
        measured={**foretold.measured, **job.measured},
        notes=[*job.notes, *foretold.notes],
        files=describe_files(job.out),
        ancestors=[*parent.ancestors, as_ancestor(parent)] if parent else [],
    )
    for name in record.files:
        to_disk(job.out / name)
    write_record(job.out, record)
    to_disk(job.out)
    return record


def _finished(staging: Path, inputs: dict[str, Any]) -> Record | None:
    """The record of a place of work that only lacked its rename."""
    record = read_record(staging)
    return record if record and record.fingerprint == fingerprint(inputs) and not damage(staging, record) else None

"""Tell an adapter where its base model lies now: `bildung relink ADAPTER BASE`.

An adapter directory holds what was learned and the place of the model it was added to. When that has moved elsewhere
than beside the adapter, nothing loads it. This checks that BASE is the model the adapter was made on, by the hash in
the adapter's record and by the shapes of all its matrices, and writes the new place into adapter_config.json and the
record. Nothing that was learned changes.

The place is a part of the adapter's files, so their hash changes: what was made from the adapter counts as made from
another one, and a recipe makes it again.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import tyro

from bildung.core.errors import AdapterError
from bildung.core.record import Record, damage, describe_files, hash_directory, read_record, write_record
from bildung.core.settings import settings
from bildung.core.staging import to_disk
from bildung.model import adapter_file
from bildung.model.store import load


@settings
class Command:
    """Where an adapter's base lies."""

    adapter: tyro.conf.Positional[Path]  # the adapter directory
    base: tyro.conf.Positional[Path]  # the model directory it belongs on
    force: bool = False  # also a base with other files than the one it was made on, if the shapes fit


def command(settings: Command) -> None:
    """`bildung relink ADAPTER BASE`."""
    before = relink(settings.adapter.expanduser(), settings.base.expanduser(), force=settings.force)
    print(f"{settings.adapter} is an adapter on {settings.base} now; it was on {before}")


def relink(adapter: Path, base: Path, *, force: bool = False) -> str:
    """Write the place of `base` into `adapter`; returns the old one.

    Raises AdapterError when `adapter` is none, was altered, or belongs on another model; ModelFileError when `base`
    cannot be loaded.
    """
    given = adapter_file.read_config(adapter)
    record = read_record(adapter)
    if record is not None:
        # The config itself may differ: a relink that was killed before it came to the record is done again.
        rest = replace(record, files={name: f for name, f in record.files.items() if name != adapter_file.CONFIG})
        if harm := damage(adapter, rest):
            raise AdapterError(f"{adapter}: {harm} since its record was written; it may be no longer what was trained.")
    if (base / adapter_file.CONFIG).exists():
        raise AdapterError(f"{base} is an adapter itself; give the model it is added to, or merge it first.")
    adapter_file.add_to(load(base).model, adapter, given)  # raises when a matrix does not fit
    found = hash_directory(base)
    made_on = record and (record.companions.get("base") or record.source)
    if made_on and made_on["hash"] != found and not force:
        raise AdapterError(
            f"{base} is not the model {adapter} was made on: that had the hash {made_on['hash'][:12]}, this one "
            f"{found[:12]}. Give the right one, or --force if only its wording differs, not its weights."
        )
    old = str(given.get("base_model_name_or_path") or "nothing")
    _rewrite(adapter / adapter_file.CONFIG, {**given, "base_model_name_or_path": os.path.abspath(base)})
    if record is not None:
        _update(record, adapter, base, found)
    return old


def _rewrite(path: Path, content: dict[str, object]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    to_disk(temporary)
    temporary.replace(path)


def _update(record: Record, adapter: Path, base: Path, found: str) -> None:
    """The record's word on the config, and on where the base is if it knows that base."""
    record.files[adapter_file.CONFIG] = describe_files(adapter)[adapter_file.CONFIG]
    for place in (record.source, record.companions.get("base")):
        if place is not None and place["hash"] == found:
            place["path"] = os.path.relpath(base, adapter)
    record.notes.append(f"its base was relinked to {os.path.relpath(base, adapter)}")
    write_record(adapter, record)

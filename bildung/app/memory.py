"""What a life remembers, so that a second run knows in a moment that nothing is to be done.

An operation's fingerprint needs its settings class, and importing that imports torch. A step is therefore up to date
without being asked when all of this holds, from .life.json in the life's directory and from the step's record:
    the recipe says the same about it as then
    the package's files are the same as then, so that the same words mean the same settings
    its record is the one that was left then, and its files are whole
    its models, its data and the records of the steps it uses have the same hashes
Whenever one of these cannot be shown the operation is called and decides. So this may ask once too often, and it never
skips what would give another result.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bildung.core.errors import DataError, OutputError
from bildung.core.inputs import differences
from bildung.core.recipe import Step
from bildung.core.record import RECORD, Record, damage, hash_directory, hash_file, read_record

MEMORY = ".life.json"


class Memory:
    """What .life.json remembers: per step what was asked, of which code, and which record came of it."""

    def __init__(self, life: Path) -> None:
        self.path = life / MEMORY
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # absent or torn: then the operations are asked
            content = {}
        self.steps: dict[str, Any] = content if isinstance(content, dict) else {}

    def note(self, step: Step, record: Record, code: str) -> None:
        """Remembers that `record` is what this code makes of this step."""
        noted = {"asked": _asked(step), "needs": _needs(step), "code": code, "fingerprint": record.fingerprint}
        self.steps[step.name] = noted
        temporary = self.path.with_name(self.path.name + ".new")
        try:
            temporary.write_text(json.dumps(self.steps, indent=1), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error}. {step.out} itself is complete") from error

    def doubt(self, step: Step, code: str) -> str:
        """Why the step may be out of date, "" when it certainly is not. Imports no operation."""
        record = read_record(step.out)
        noted = self.steps.get(step.name)
        if record is None:
            return f"stop: {step.out} was not made by bildung"
        if not isinstance(noted, dict) or noted.get("fingerprint") != record.fingerprint:
            return "check: it was not made by this recipe"
        if noted.get("asked") != _asked(step):
            return "changed: " + "; ".join(differences(noted.get("asked"), _asked(step)))
        if what := damage(step.out, record):
            return f"run: {what}"
        if noted.get("needs") != _needs(step) or not _same_models(step.out, record):
            return "check: a model it uses changed"
        for name, known in record.data.items():
            if name != step.source and _hash_of_data(name) != known:
                return f"check: {name} changed"
        return "" if noted.get("code") == code else "check: bildung itself changed"


def _asked(step: Step) -> Any:
    return json.loads(json.dumps(step.asked(), default=str))  # a YAML date is no JSON value; compare what JSON keeps


def _needs(step: Step) -> dict[str, str]:
    """The records of the steps it uses: a report reads those, not the models."""
    records = {name: step.out.parent / name / RECORD for name in step.needs}
    return {name: hash_file(path) for name, path in records.items() if path.is_file()}


def _same_models(out: Path, record: Record) -> bool:
    """Whether the source and the companions a record names are where they were, with the same contents."""
    models = [record.source] if record.source else []
    for model in [*models, *record.companions.values()]:
        path = Path(os.path.normpath(out / model["path"]))
        if not path.exists() or hash_directory(path) != model["hash"]:
            return False
    return True


def _hash_of_data(name: str) -> str | None:
    """The present hash of data that a record names, None when it cannot be told (see data.sources.fingerprint)."""
    from bildung.data.sources import SPLITS, fingerprint

    if Path(name).is_file():
        return hash_file(Path(name))
    source = name.split("/")[0] if name.startswith(("nursery:", "mini:")) else name
    for split in (None, *SPLITS):
        try:
            found = fingerprint(source, split)
        except DataError:
            continue
        if name in found:
            return found[name]
    return None

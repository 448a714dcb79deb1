"""Live a recipe: run the operations of a model's life that are not up to date.

The plan comes first. What app/memory.py can show to be up to date is skipped without importing its operation; any other
step is called and decides for itself, from its fingerprint (core/operation.py), whether there is something to do.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from bildung.app.ahead import Ahead
from bildung.app.memory import Memory
from bildung.core import ranks
from bildung.core.errors import RecipeError, SettingsError, nearest
from bildung.core.operation import OccupiedError
from bildung.core.progress import duration, size
from bildung.core.recipe import Recipe, Step, read_recipe
from bildung.core.record import Record, read_record
from bildung.core.settings import resolve, settings
from bildung.core.staging import staging_of, was_interrupted
from bildung.core.verbs import code_hash

UP_TO_DATE = "up to date"


@settings
class Command:
    recipe: tyro.conf.Positional[Path]  # the YAML file
    force: tuple[str, ...] = ()  # steps to make anew even if they are up to date; `all` for all
    plan: bool = False  # only say what would be done


def command(settings: Command) -> None:
    """`bildung live RECIPE`."""
    recipe = read_recipe(settings.recipe)
    forced = _forced(recipe, settings.force)
    if settings.plan:
        Console(highlight=False).print(_table(recipe, plan(recipe, forced)))
    else:
        live(recipe, forced)


def live(recipe: Recipe, forced: frozenset[str] = frozenset()) -> dict[str, Record]:
    """Brings every step up to date, in order; returns the records. A step that fails or is killed costs only itself."""
    console = Console(highlight=False, quiet=ranks.rank() > 0)
    memory, code = Memory(recipe.out), code_hash()
    planned = plan(recipe, forced, memory, code)
    console.print(_table(recipe, planned))
    # A misspelt setting in the last step must not show after hours of the first: check all before running any.
    calls = {step.name: _prepare(step) for step in recipe.steps if planned[step.name] != UP_TO_DATE}
    records: dict[str, Record] = {}
    start = time.monotonic()
    with Ahead() as ahead:
        for step in recipe.steps:
            before = read_record(step.out)
            if planned[step.name] == UP_TO_DATE and before is not None:
                records[step.name] = before
                continue
            console.rule(f"{step.name}: {step.verb.name}", align="left")
            try:
                with ahead.of(step):
                    records[step.name] = record = _run(step, calls[step.name], step.name in forced)
            except KeyboardInterrupt:
                kept = ", ".join(records) or "no step yet"
                place = staging_of(step.out)
                partial = f" {step.name} goes on from {place}." if was_interrupted(place) else ""
                raise KeyboardInterrupt(f"Finished: {kept}.{partial}") from None
            if ranks.rank() == 0:
                memory.note(step, record, code)
            took = f"{duration(record.seconds)}, peak memory {size(record.peak_bytes)}"
            said = "found up to date" if record == before else f"done in {took}"
            console.print(f"{step.name}: {said}", markup=False)
            gc.collect()  # the next step's peak should not carry this one's garbage
    if calls:
        console.print(_costs(recipe, records, time.monotonic() - start))
    else:
        console.print(f"{recipe.name} is up to date", markup=False)
    for step in recipe.steps:
        for name in records[step.name].files:
            if name.endswith("report.html"):
                console.print(f"report: {step.out / name}", markup=False, soft_wrap=True)
    return records


def plan(
    recipe: Recipe, forced: frozenset[str] = frozenset(), memory: Memory | None = None, code: str = ""
) -> dict[str, str]:
    """{step: UP_TO_DATE, or why it will be looked at}."""
    memory, code = memory or Memory(recipe.out), code or code_hash()
    planned: dict[str, str] = {}
    for step in recipe.steps:
        behind = [name for name in step.needs if planned[name] != UP_TO_DATE]
        if step.name in forced:
            planned[step.name] = "run: forced"
        elif not step.out.exists():
            interrupted = was_interrupted(staging_of(step.out))
            planned[step.name] = "run: goes on from an interruption" if interrupted else "run: new"
        elif behind:
            planned[step.name] = f"run if the result of {', '.join(behind)} is another"
        else:
            planned[step.name] = memory.doubt(step, code) or UP_TO_DATE
    return planned


@dataclasses.dataclass(frozen=True)
class _Call:
    """An operation with its settings, ready to run."""

    function: Any
    settings: Any


def _prepare(step: Step) -> _Call:
    module = step.verb.load()
    function = getattr(module, step.verb.module.rpartition(".")[2])
    if step.source is None and "None" not in str(inspect.signature(function).parameters["source"].annotation):
        raise RecipeError(f"step {step.name!r} ({step.verb.name}): `from` is missing, and no step stands before it")
    try:
        return _Call(function, resolve(module.Settings, step.settings(module.Settings)))
    except SettingsError as error:
        raise SettingsError(f"step {step.name!r} ({step.verb.name}): {error}") from None


def _run(step: Step, call: _Call, force: bool) -> Record:
    if not force:
        try:
            return call.function(step.source, step.out, call.settings, force=False)
        except OccupiedError:  # an earlier result of this very step: the recipe owns the place and may replace it
            pass
    return call.function(step.source, step.out, call.settings, force=True)


def _forced(recipe: Recipe, names: tuple[str, ...]) -> frozenset[str]:
    steps = [step.name for step in recipe.steps]
    if "all" in names:
        return frozenset(steps)
    for name in names:
        if name not in steps:
            hint = nearest(name, steps) or "there are: " + ", ".join(steps)
            raise RecipeError(f"--force {name}: no step is called {name!r}; {hint}; or all")
    return frozenset(names)


def _table(recipe: Recipe, planned: Mapping[str, str]) -> Table:
    table = Table(title=f"{recipe.name} in {recipe.out}", title_justify="left", box=None)
    for column in ("step", "operation", "from", "plan"):
        table.add_column(column, overflow="fold")
    for step in recipe.steps:
        inside = isinstance(step.source, Path) and step.source.parent == recipe.out
        source = step.source.name if inside and isinstance(step.source, Path) else str(step.source or "")
        table.add_row(step.name, step.verb.name, source, planned[step.name])
    return table


def _costs(recipe: Recipe, records: Mapping[str, Record], seconds: float) -> Table:
    table = Table(title=f"{recipe.name}: {duration(seconds)}", title_justify="left", box=None)
    for column in ("step", "time", "predicted", "peak memory", "on disk", "trained tokens"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, record in records.items():
        disk = size(sum(file["bytes"] for file in record.files.values()))
        trained = f"{record.trained_tokens:,}" if record.trained_tokens else ""
        predicted = size(foretold) if (foretold := record.measured.get("predicted_peak_bytes")) else ""
        table.add_row(name, duration(record.seconds), predicted, size(record.peak_bytes), disk, trained)
    return table

"""The plan of a recipe: the peak of each of its steps, where what the step starts from is there or stands in.

A step's model may not be made yet. Then the nearest model before it that is there stands in: tuning, aligning and
evaluating change no shapes. Of a step without one it is said that it cannot be planned yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bildung.app.planning import plain, several, using
from bildung.app.planning.passing import PASSING, looked
from bildung.app.planning.reading import tokenizers_bytes
from bildung.app.planning.training import runtime, subject
from bildung.core.errors import BildungError, SettingsError
from bildung.core.progress import size
from bildung.core.recipe import Recipe, Step, read_recipe
from bildung.core.verbs import Verb
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.plan import KERNELS


def of_recipe(path: Path, room: int, on_accelerator: bool, console: Console) -> bool:
    """Every step's peak, printed; whether the largest fits. Raises RecipeError."""
    recipe, peaks = read_recipe(path), dict[str, int]()
    table = Table("step", "operation", "planned from", "peak", "", box=None)
    for step in recipe.steps:
        source = there(recipe, step) or (Path(step.source) if isinstance(step.source, str) else None)
        try:
            values = step.settings(step.verb.load().Settings)
            peak = sum(step_parts(step.verb, source, values, on_accelerator).values())
        except (BildungError, OSError) as error:
            table.add_row(step.name, step.verb.name, str(source or ""), "", f"not planned: {str(error)[:120]}")
            continue
        peaks[step.name] = peak
        table.add_row(step.name, step.verb.name, str(source or ""), size(peak), "" if peak <= room else "too much")
    console.print(table)
    if not peaks:
        console.print("No step can be planned before the first of them is made: `bildung adopt` it, and plan again.")
        return True
    name = max(peaks, key=lambda one: peaks[one])
    of = "" if len(peaks) == len(recipe.steps) else " of those that can be planned now"
    fits = peaks[name] <= room
    short = f"fits {size(room)}" if fits else f"is too large for {size(room)}; `bildung plan` of it says what would fit"
    console.print(f"The largest step{of}, {name}, {short} (peak {size(peaks[name])}).", markup=False, soft_wrap=True)
    return fits


def there(recipe: Recipe, step: Step) -> Path | None:
    """What the step starts from, or the nearest thing before it that is there."""
    by_place = {str(one.out): one for one in recipe.steps}
    source: Any = step.source
    while source is not None:
        if Path(str(source)).expanduser().exists():
            return Path(str(source)).expanduser()
        before = by_place.get(str(source))
        source = before.source if before is not None else None
    return None


def step_parts(
    verb: Verb, source: Path | None, values: Mapping[str, Any], on_accelerator: bool, *, beside: bool = False
) -> dict[str, int]:
    """Bytes of one step at its fullest moment, by part. Raises BildungError for what cannot be planned.

    beside: it will run in a process that knows how large it is by then; "runtime" is what kernels will take there.
    """
    name, kind = verb.name, verb.load().Settings
    if name in plain.PLAIN:
        return {**plain.parts(name, str(source or ""), values), "runtime": 0 if beside else runtime()}
    if source is None or not source.exists():
        raise SettingsError(f"{source} is not there yet.")
    if name in using.OPERATIONS:
        known = {key: value for key, value in values.items() if key in using.GIVEN[name] and value is not None}
        if "prompts" in values:
            known |= using.asked_in(values["prompts"], known.get("new_tokens", 64), source)
        parts = using.use(name, source, known, KERNELS if beside else runtime()).parts
        return {**parts, "tokenizers": tokenizers_bytes([Tokenizer.load(using.base_of(source))])} if beside else parts
    if name in PASSING or name == "look index":
        made = max(looked(name, source, values, own=0 if beside else None), key=lambda one: one.peak_bytes)
        if not beside:
            return made.parts
        tokenizers = {id(one.tokenizer): one.tokenizer for one in made.look.lms if isinstance(one.tokenizer, Tokenizer)}
        return {**made.parts, "tokenizers": tokenizers_bytes(tokenizers.values())}
    given = several.with_stand_ins(kind, values)
    if name in several.SEVERAL:
        trained = [one.parts(on_accelerator) for one in several.trainings(name, source, given)]
        found = max(trained, key=lambda some: sum(some.values()))
    else:
        found = subject(name, source, given).plan(on_accelerator).parts
    return {**found, "runtime": KERNELS} if beside else found

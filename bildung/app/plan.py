"""Before an operation: what it will hold and compute, whether that fits, how long it will take, on how many devices.

    bildung plan "tune lora" lives/smollm2/base --given rank=16 batch_size=4 max_length=512 steps=40
    bildung plan "tune full" lives/smollm2/base --given data=nursery:alpaca --memory 3GB
    bildung plan "pretrain causal" words --given "model={model_type: llama, ...}" steps=1000 --memory 80GB --device cuda
    bildung plan generate lives/smollm2/base --given prompt=4096 new_tokens=512 rows=8
    bildung plan "look patch" lives/smollm2/base --given pairs=ioi count=32
    bildung plan live recipes/smollm2.yaml

Every operation has a plan:

    what trains            a step on paper (train/plan.py), for any number of devices; with `data` among the settings of
                           a tuning its real batches, otherwise full rows
    what trains often      tune compare, tune by_examples, continual train: each training, and the sum of their steps
    what runs a model      looks, embed, evaluate, generate ...: the models it loads, and its largest pass on paper
    what runs none         said in a line
    a recipe               each of its steps; the largest

What nobody gave and the operation cannot do without is stood in for, and that is said. The time comes from a few steps
on random numbers, or from a few passes of the model itself, which take `seconds`.

Exit code 1 says that the operation, as it was given, does not fit the memory (with `parallel` among its settings: not
on any of the numbers of devices planned for); what would fit has then been printed.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any, Literal

import psutil
import tyro
import yaml
from rich.console import Console

from bildung.core.errors import SettingsError, nearest
from bildung.core.progress import duration, size
from bildung.core.settings import as_dict, field_names, resolve, settings
from bildung.core.verbs import find, verbs

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


@settings
class Command:
    operation: tyro.conf.Positional[str]  # a verb, in quotes: "tune lora", "look patch", quantize, generate, live
    source: tyro.conf.Positional[Path]  # the directory it would start from; of live: the recipe
    given: tuple[str, ...] = ()  # its settings, as name=value
    memory: str | None = None  # of one device, such as 24GB; default: all there is here. Exit code 1: it does not fit
    device: Literal["cpu", "cuda"] | None = None  # default: cuda where there is one
    ranks: tuple[int, ...] = (1, 2, 4, 8)  # numbers of devices to plan for
    seconds: float = 10.0  # how long to measure the speed; 0: not at all


def command(settings: Command) -> None:
    """`bildung plan OPERATION SOURCE`."""
    import torch

    from bildung.app.planning.live import of_recipe
    from bildung.train.memory import room_of

    if wrong := [count for count in settings.ranks if count < 1]:
        raise SettingsError(f"ranks = {wrong[0]}: a number of devices is at least 1.")
    if not 0 <= settings.seconds < math.inf:
        raise SettingsError(f"seconds = {settings.seconds}; it must be at least 0 (0: nothing is measured).")
    find(settings.operation, verbs())
    source, console = settings.source.expanduser(), Console(highlight=False)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.memory is None and device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("there is no GPU here; say how much memory it has: --memory 80GB.")
    room = bytes_of(settings.memory) if settings.memory else room_of(torch.device(device))
    console.print(f"{settings.operation} from {settings.source}", markup=False)
    if settings.operation == "live":
        if settings.given:
            raise SettingsError(
                f"--given {settings.given[0]}: a recipe's steps have their own settings; change it there."
            )
        fits = of_recipe(source, room, device == "cuda", console)
    else:
        fits = planned(settings, source, room, device == "cuda", console)
    if not fits:
        sys.exit(1)


def planned(settings: Command, source: Path, room: int, on_accelerator: bool, console: Console) -> bool:
    """The plan of one operation, printed; whether it fits."""
    from bildung.app.planning import plain, several, using
    from bildung.app.planning.passing import PASSING, passing

    operation, values = settings.operation, words(settings.given)
    if operation in plain.PLAIN:
        console.print("\n".join(plain.lines(operation, source, values)), markup=False, soft_wrap=True)
        return True
    if operation in using.OPERATIONS:
        return untrained(settings, source, room, console)
    if operation in PASSING or operation == "look index":
        return passing(operation, source, values, room, settings.seconds, console)
    if operation in several.SEVERAL:
        return several_times(settings, source, room, on_accelerator, console)
    return training(settings, source, room, on_accelerator, console)


def training(settings: Command, source: Path, room: int, on_accelerator: bool, console: Console) -> bool:
    """The plan of an operation that trains; whether it fits as it was given."""
    from bildung.app.planning.advice import devices, in_words, what_fits
    from bildung.app.planning.tables import arithmetic, parts_table, ranks_table, textbook_table, time_line
    from bildung.app.planning.training import subject

    operation, values = settings.operation, words(settings.given)
    planned = subject(operation, source, settings_of(operation, values), read_data="data" in values)
    made = planned.plan(on_accelerator)
    if planned.said:
        console.print(planned.said, markup=False)
    console.print(
        f"  {made.parameters:,} parameters, {made.trainable:,} of them trained; "
        f"{made.flops_per_token:,} floating-point operations per trained token"
    )
    console.print(arithmetic(planned.model, planned.length))
    console.print(parts_table(made.parts))
    console.print(ranks_table(made, settings.ranks, room))
    console.print(textbook_table(made.trainable, settings.ranks))
    console.print(
        "  DeepSpeed's estimators print other numbers: zero2 4 P + 16 P/N, zero3 18 P/N and the largest layer. None of "
        "these counts activations.",
        markup=False,
        soft_wrap=True,
    )
    if made.peak_bytes <= room:
        console.print(f"It fits one device with {size(room)} (peak {size(made.peak_bytes)}).", markup=False)
    else:
        console.print(f"One device with {size(room)} is too small by {size(made.peak_bytes - room)}.", markup=False)
        found = what_fits(operation, planned.given, made.peak_bytes, room, planner(source, on_accelerator))
        if found is not None:
            console.print(in_words(operation, *found), markup=False, soft_wrap=True)
        if said := devices(made, settings.ranks, room):
            console.print(said, markup=False, soft_wrap=True)
        if found is None and not said:
            console.print("Nothing that was tried fits: a smaller model, or more devices.", markup=False)
    if settings.seconds and made.peak_bytes < psutil.virtual_memory().available:
        console.print(time_line(planned, settings.seconds), markup=False)
    asked = planned.given.parallel
    shared = {"none": "ddp", "hybrid": "zero3"}.get(asked, asked)
    counts = [count for count in settings.ranks if asked != "tensor" or made.divisible % count == 0]
    return any(made.on(count, shared) <= room for count in (counts if asked != "none" else (1,)))


def planner(source: Path, on_accelerator: bool) -> Any:
    """(operation, settings) -> peak bytes, for advice.what_fits."""
    from bildung.app.planning.training import subject
    from bildung.app.planning.using import BITS

    known: dict[Any, Any] = {}  # steps on paper; the optimizer is no part of them

    def peak(operation: str, given: Any) -> int:
        base = "tune lora" if operation == "tune qlora" else operation
        kind = find(base, verbs()).load().Settings
        changed = as_dict(given) if isinstance(given, kind) else common(given, kind)
        planned = subject(base, source, resolve(kind, changed))
        key = (base, planned.rows, planned.length, given.recompute, given.micro_steps > 1)
        made = planned.plan(on_accelerator, known.get(key))
        known[key] = made.moments
        if operation != "tune qlora":
            return int(made.peak_bytes)
        frozen = [one for name, one in planned.model.linears().items() if name != "lm_head"]
        numbers = sum(one.in_features * one.out_features for one in frozen)
        less = int(numbers * (planned.model.dtype.itemsize - BITS["nf4"] / 8))
        return int(dataclasses.replace(made, weights=made.weights - less).peak_bytes)

    return peak


def common(given: Any, kind: type) -> dict[str, Any]:
    """What an operation's settings say that another's can take over."""
    from bildung.train.training import Training

    shared = {*field_names(Training), "data", "max_length", "pack"} & set(field_names(kind))
    return {name: value for name, value in as_dict(given).items() if name in shared and name != "learning_rate"}


def several_times(settings: Command, source: Path, room: int, on_accelerator: bool, console: Console) -> bool:
    """The plan of an operation that trains several times; whether the largest training fits."""
    from bildung.app.planning import several
    from bildung.app.planning.tables import parts_table, steps_seconds

    given = several.with_stand_ins(find(settings.operation, verbs()).load().Settings, words(settings.given))
    made = several.trainings(settings.operation, source, given)
    peaks: dict[str, int] = {}
    largest: dict[str, int] = {}
    for one in made:
        parts = one.parts(on_accelerator)
        peaks[one.name] = sum(parts.values())
        largest = max(largest, parts, key=lambda some: sum(some.values()))
        steps = "" if one.steps is None else f", {one.steps:,} steps"
        console.print(f"  {one.name}: peak {size(peaks[one.name])}{steps}", markup=False)
    console.print(parts_table(largest))
    if said := several.beside_in_words(given):
        console.print(f"  {said}", markup=False)
    peak = max(peaks.values())
    if peak <= room:
        console.print(f"It fits one device with {size(room)} (peak {size(peak)}).", markup=False)
    else:
        name = max(peaks, key=lambda one: peaks[one])
        console.print(f"One device with {size(room)} is too small by {size(peak - room)}: {name}.", markup=False)
        left = [one for one in peaks if peaks[one] <= room]
        console.print(f"What fits: {', '.join(left)}." if left else "Give a smaller batch_size or max_length.")
    if settings.seconds and peak < psutil.virtual_memory().available:
        parts_of_time = [steps_seconds(one.planned, settings.seconds / len(made)) for one in made]
        if several.steps_of(made) is None:
            shown = ", ".join(f"{one.name} {took:.2g} s a step" for one, took in zip(made, parts_of_time, strict=True))
            console.print(f"{shown}; how many steps the data says", markup=False, soft_wrap=True)
        else:
            took = sum((one.steps or 0) * each for one, each in zip(made, parts_of_time, strict=True))
            console.print(f"about {duration(took)} for the steps of all trainings", markup=False)
    return peak <= room


def untrained(settings: Command, source: Path, room: int, console: Console) -> bool:
    """The plan of an operation that trains nothing; whether it fits."""
    from bildung.app.planning.passes import process_bytes
    from bildung.app.planning.tables import arithmetic, parts_table
    from bildung.app.planning.using import base_of, use, using_less
    from bildung.model.config import read_config
    from bildung.model.count import on_paper

    made = use(settings.operation, source, words(settings.given), process_bytes(settings.operation, source))
    console.print(
        f"  {made.parameters:,} parameters; {made.flops_per_token:,} floating-point operations per token read"
    )
    console.print(arithmetic(on_paper(read_config(base_of(source))), made.length))
    console.print(parts_table(made.parts))
    if made.peak_bytes <= room:
        console.print(f"It fits {size(room)} (peak {size(made.peak_bytes)}).", markup=False)
        return True
    largest = max(made.parts, key=lambda name: made.parts[name])
    console.print(f"{size(room)} is too small by {size(made.peak_bytes - room)}; the largest part: {largest}.")
    for change in using_less(settings.operation, words(settings.given), made.length):
        smaller = use(settings.operation, source, change, made.parts["runtime"])
        if smaller.peak_bytes <= room:
            said = " ".join(f"{name}={value}" for name, value in change.items())
            console.print(f"With {said} it takes {size(smaller.peak_bytes)}.", markup=False)
            return False
    if largest == "runtime":
        console.print("The process itself takes most of it: no smaller model would fit either.")
    else:
        console.print("Quantize the model first (`bildung quantize --method nf4`), or use a machine with more memory.")
    return False


def words(given: tuple[str, ...]) -> dict[str, Any]:
    """name=value words. Raises SettingsError."""
    for word in given:
        if "=" not in word:
            raise SettingsError(f"--given {word!r}: settings are written name=value, such as batch_size=4.")
    found: dict[str, Any] = {}
    for name, _, value in (word.partition("=") for word in given):
        if name in found:
            raise SettingsError(f"--given {name} was given twice; leave one of them out.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"--given {name}={value!r} cannot be read as YAML: {error}") from error
    return found


def settings_of(operation: str, values: dict[str, Any]) -> Any:
    """The settings of a training operation, with some data and words where none are given. Raises SettingsError."""
    from bildung.app.planning.several import with_stand_ins
    from bildung.train.ranges import check_numbers
    from bildung.train.training import Training
    from bildung.tune.forgetting import Forgetting, check_budget

    module = find(operation, verbs()).load()
    kind = getattr(module, "Settings", None)
    if kind is None or not issubclass(kind, Training):
        raise SettingsError(f"{operation!r} does not train; {nearest(operation, verbs())}".strip())
    given = with_stand_ins(kind, values)
    check_numbers(given)
    if isinstance(given, Forgetting):
        check_budget(given, getattr(given, "card", None), more=True)
    return given


def bytes_of(text: str) -> int:
    """24GB, 512 MiB ... in bytes. Raises SettingsError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(MB|GB|MiB|GiB)\s*", text)
    if found is None or not math.isfinite(float(found.group(1))):
        raise SettingsError(f"memory = {text!r}; a number with {', '.join(UNITS)} is expected, such as 24GB.")
    return int(float(found.group(1)) * UNITS[found.group(2)])

"""Before a run: will it fit, how long will it take, on how many devices.

    bildung plan "tune lora" lives/smollm2/base --given rank=16 batch_size=4 max_length=640 steps=40
    bildung plan "pretrain causal" tokenizer --given "model={model_type: llama, ...}" steps=1000 --memory 16GB

What is counted stands in train/plan.py. The time comes from a few steps on random numbers, which take `seconds`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import tyro
import yaml
from rich.console import Console
from rich.table import Table

from bildung.core.errors import SettingsError
from bildung.core.settings import resolve, settings
from bildung.core.verbs import find, verbs

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


@settings
class Command:
    operation: tyro.conf.Positional[str]  # a verb that trains, in quotes: "tune lora", "pretrain causal", "align dpo"
    source: tyro.conf.Positional[Path]  # the directory it would start from
    given: tuple[str, ...] = ()  # its settings, as name=value
    memory: str | None = None  # of one device, such as 24GB; default: what is free here
    ranks: tuple[int, ...] = (1, 2, 4, 8)  # numbers of devices to plan for
    seconds: float = 10.0  # how long to measure the speed; 0: not at all


def command(settings: Command) -> None:
    """`bildung plan OPERATION SOURCE`."""
    from bildung.train.plan import plan, speed

    room = bytes_of(settings.memory) if settings.memory else psutil.virtual_memory().available
    given, by_size = complete(settings_of(settings.operation, settings.given), settings.source.expanduser())
    model, rows, length = as_trained(settings.operation, settings.source.expanduser(), given)
    made = plan(model, rows=rows, length=length, optimizer=given.optimizer, micro_steps=given.micro_steps)
    console = Console(highlight=False)
    console.print(f"{settings.operation} from {settings.source}", markup=False)
    if by_size:
        console.print(by_size, markup=False)
    console.print(
        f"  {made.parameters:,} parameters, {made.trainable:,} of them trained; "
        f"{made.flops_per_token:,} floating-point operations per trained token"
    )
    console.print(_parts(made))
    console.print(_ranks(made, settings.ranks, room))
    for line in advice(made, settings.ranks, room, rows):
        console.print(line, markup=False, soft_wrap=True)
    if settings.seconds and made.peak_bytes < psutil.virtual_memory().available:
        per_second = speed(model, rows=rows, length=length, seconds=settings.seconds)
        line = f"about {per_second:,.0f} tokens/s on this machine"
        if given.steps is not None:
            tokens = given.steps * given.micro_steps * rows * length
            line += f": {given.steps} steps of {tokens // given.steps:,} tokens in {minutes(tokens / per_second)}"
        console.print(line, markup=False)


def settings_of(operation: str, given: tuple[str, ...]) -> Any:
    """The settings of a training operation from name=value words. Raises SettingsError."""
    from bildung.train.training import Training

    module = find(operation, verbs()).load()
    kind = getattr(module, "Settings", None)
    if kind is None or not issubclass(kind, Training):
        raise SettingsError(f"{operation!r} does not train; plans are for operations that do, such as 'tune lora'.")
    words = dict(word.partition("=")[::2] for word in given)
    values = {name: yaml.safe_load(value) for name, value in words.items()}
    return resolve(kind, {"data": "mini:chat", **values} if "data" in kind.__dataclass_fields__ else values)


def complete(given: Any, source: Path) -> tuple[Any, str]:
    """The settings with what follows from `size` filled in, and what was chosen in words."""
    from bildung.pretrain.size import Sized, chosen

    return chosen(given, source) if isinstance(given, Sized) else (given, "")


def as_trained(operation: str, source: Path, given: Any) -> tuple[Any, int, int]:
    """(the model on paper as the operation would train it, rows of a micro-batch, their length)."""
    import torch

    from bildung.model.config import from_dict, read_config
    from bildung.model.count import on_paper
    from bildung.model.store import LanguageModel
    from bildung.pretrain.birth import config_for
    from bildung.tokens.tokenizer import Tokenizer

    given, _ = complete(given, source)
    if (source / "config.json").exists():
        config = read_config(source)
    elif getattr(given, "model", None) is not None:
        keys = yaml.safe_load(given.model)
        config = from_dict(keys) if operation == "pretrain image" else config_for(Tokenizer.load(source), keys)
    else:
        raise SettingsError(f"{source} holds no model; give model={{...}}, the keys of the config.json of a new one.")
    model: Any = on_paper(config)
    rows = given.batch_size * (2 if operation == "align dpo" else 1)
    if (add := _addition(operation, given)) is not None:
        model = model.to(torch.bfloat16 if given.precision == "bf16" else torch.float32)
        whole = LanguageModel(model, Tokenizer.load(source), config)
        add(whole if operation in ("tune prompt", "tune prefix") else model, given)
    else:
        model.requires_grad_(True)
    return model, rows, getattr(given, "max_length", config.max_position_embeddings)


def _addition(operation: str, given: Any) -> Callable[[Any, Any], Any] | None:
    """What freezes the model and adds what trains: `add_NAME` of bildung/tune/NAME.py; None when all of it trains."""
    from bildung.tune.lora import add_lora

    own = getattr(find(operation, verbs()).load(), f"add_{operation.partition(' ')[2]}", None)
    return own if own is not None or not hasattr(given, "rank") else add_lora


def advice(made: Any, ranks: tuple[int, ...], room: int, rows: int) -> list[str]:
    """What fits, in words."""
    if made.peak_bytes <= room:
        return [f"It fits one device with {show(room)} (peak {show(made.peak_bytes)})."]
    said = [f"One device with {show(room)} is too small by {show(made.peak_bytes - room)}."]
    for count in sorted(ranks):
        for kind in ("zero1", "zero2", "zero3"):
            if count > 1 and made.on(count, kind) <= room:
                each = show(made.on(count, kind))
                return [*said, f"{count} devices with --parallel {kind} are enough ({each} each)."]
    if made.activations > made.peak_bytes / 3 and rows > 1:
        said.append(
            f"Activations are the largest part: batch_size {max(1, rows // 2)} with twice the micro_steps is the same "
            f"training in {show(made.peak_bytes - made.activations // 2)}."
        )
    return said


def _parts(made: Any) -> Table:
    table = Table("part", "bytes", "share", box=None)
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "runtime"):
        value = getattr(made, name)
        table.add_row(name, show(value), f"{value / made.peak_bytes:.0%}")
    table.add_row("peak", show(made.peak_bytes), "")
    return table


def _ranks(made: Any, ranks: tuple[int, ...], room: int) -> Table:
    table = Table("devices", "ddp", "zero1", "zero2", "zero3", box=None)
    for count in ranks:
        cells = [made.on(count, kind) for kind in ("ddp", "zero1", "zero2", "zero3")]
        table.add_row(str(count), *(f"{show(cell)}{'' if cell <= room else ' (too much)'}" for cell in cells))
    return table


def bytes_of(text: str) -> int:
    """24GB, 512 MiB ... in bytes. Raises SettingsError."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*(MB|GB|MiB|GiB)\s*", text)
    if found is None or not math.isfinite(float(found.group(1))):
        raise SettingsError(f"memory = {text!r}; a number with {', '.join(UNITS)} is expected, such as 24GB.")
    return int(float(found.group(1)) * UNITS[found.group(2)])


def show(value: float) -> str:
    """Bytes for people."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def minutes(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

"""The plan of operations that run models without training them: what they hold, and their fullest pass.

    looks                                                    looking.py
    what holds a model and hardly runs it, embed, export     holding.py

The settings are the operation's own. For what was not given and cannot be left out something stands in, and is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from bildung.app.planning.holding import HOLDING
from bildung.app.planning.looking import INDEX, LOOKS
from bildung.app.planning.passes import FORWARD, PROMPT, Look, Pass, fullest, own_bytes, seconds_of
from bildung.app.planning.reading import tokenizers_bytes
from bildung.app.planning.tables import parts_table
from bildung.app.planning.using import base_of
from bildung.core.errors import SettingsError
from bildung.core.progress import duration, size
from bildung.core.settings import resolve
from bildung.core.verbs import find, verbs
from bildung.model.adapter_file import CONFIG as ADAPTER
from bildung.model.count import count, totals
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.plan import KERNELS

PASSING = {**LOOKS, **HOLDING}
STANDS_IN: Mapping[str, Any] = {
    "prompt": "",
    "subject": "",
    "data": "",
    "sites": ("layers.*.resid_post",),
    "site": "layers.0.resid_post",
    "positive": "",
    "negative": "",
    "source": (),
    "against": Path("."),
    "image": Path("."),
    "adapters": (),
    "b": Path("."),
    "base": Path("."),
    "out": Path("."),
    "positions": 2,
    "rank": 1,
    "method": "int8",
    "texts": (),
}
HALVED = ("batch_size", "batch_tokens", "rows", "samples", "points", "limit", "text_rows", "length", "max_length")


@dataclasses.dataclass(frozen=True)
class Looked:
    """What a look holds at its fullest moment, and the passes that it makes."""

    look: Look
    passes: list[Pass]
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The most that is there at a time."""
        return sum(self.parts.values())

    @property
    def parameters(self) -> int:
        """Of the source."""
        return sum(one.numel() for one in self.look.lms[0].model.parameters())

    @property
    def flops_per_token(self) -> int:
        """Of a forward pass of the source over a prompt."""
        _, multiply_adds = totals(count(self.look.lms[0].model, PROMPT))
        return round(2 * multiply_adds / PROMPT)


def looked(
    operation: str, source: Path, values: Mapping[str, Any], length: int = PROMPT, own: int | None = None
) -> list[Looked]:
    """The plan of an operation; of `look index` those of the looks it makes. length: of a prompt that is not given.
    own: bytes of the process before it begins; default: of one that has imported what the operation needs.

    Raises SettingsError for a setting that there is not, and what the operation itself raises for a model that it
    refuses.
    """
    if operation == "look index":
        given, _ = settings_for(operation, values)
        both = {"prompt": given.prompt, "chat": given.chat, "against": given.against}
        made = []
        for name, needs in INDEX.items():
            if given.against or name != "look compare":
                made += looked(name, source, both if needs else {}, length, own)
        return made
    given, assumed = settings_for(operation, values)
    look = Look(source, given, assumed, length)
    passes = PASSING[operation](look)
    narrow = any(one.model.dtype != torch.float32 for one in look.lms)  # kernels of bfloat16 take as much as training's
    kernels = KERNELS if passes and (narrow or any(one.back for one in passes)) else FORWARD if passes else 0
    verb, place = look.runs or (operation, source)
    place = base_of(place) if (place / ADAPTER).exists() else place
    if own is None:  # with the tokenizer of the first model
        own = own_bytes(find(verb, verbs()).load().__name__, place)
        first = look.lms[0].tokenizer if look.lms else None
        others = {id(one.tokenizer): one.tokenizer for one in look.lms if one.tokenizer is not first}
        look.parts["tokenizers"] = tokenizers_bytes(one for one in others.values() if isinstance(one, Tokenizer))
    found = max(fullest(look.lms, passes), look.later, key=lambda parts: sum(parts.values()))
    parts = {name: bytes_ for name, bytes_ in {**look.parts, **found}.items() if bytes_}
    return [Looked(look, passes, {**parts, "runtime": own + kernels})]


def settings_for(operation: str, values: Mapping[str, Any]) -> tuple[Any, frozenset[str]]:
    """(an operation's settings, those of them that nobody gave and that something stands in for). Raises
    SettingsError."""
    module = find(operation, verbs()).load()
    kind = getattr(module, "Settings", None) or module.Command
    if operation == "evaluate" and "card" not in values:  # on the command line the card's settings are its own
        values = {"card": dict(values)}
    without = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [one.name for one in dataclasses.fields(kind) if (one.default, one.default_factory) == without]
    own = needed[:1] if not hasattr(module, "Settings") else []  # of a command, what it starts from is a setting, too
    assumed = frozenset(name for name in needed if name not in values and name not in own)
    put_in: dict[str, Any] = {**dict.fromkeys(own, Path(".")), **{name: STANDS_IN[name] for name in assumed}}
    given = resolve(kind, {**put_in, **values})
    return given, assumed | ({"prompt"} if getattr(given, "prompt", "") is None else set())


def passing(
    operation: str, source: Path, values: Mapping[str, Any], room: int, seconds: float, console: Console
) -> bool:
    """The plan of one of PASSING, or of `look index`, printed; whether it fits."""
    every = looked(operation, source, values)
    made = max(every, key=lambda one: one.peak_bytes)
    if made.look.lms:
        console.print(
            f"  {made.parameters:,} parameters; {made.flops_per_token:,} floating-point operations per token read"
        )
    for line in dict.fromkeys(said for one in every for said in one.look.said):
        console.print(f"  assumed: {line}", markup=False, soft_wrap=True)
    for line in dict.fromkeys(remark for one in every for remark in one.look.remarks):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    for one in every:
        for part in one.passes:
            console.print(f"  {part.what}", markup=False, soft_wrap=True)
    console.print(parts_table(made.parts))
    fits = made.peak_bytes <= room
    if fits:
        console.print(f"It fits {size(room)} (peak {size(made.peak_bytes)}).", markup=False)
    else:
        largest = max(made.parts, key=lambda name: made.parts[name])
        short = f"{size(room)} is too small by {size(made.peak_bytes - room)}; the largest part: {largest}."
        console.print(short, smaller(operation, source, values, room), markup=False, soft_wrap=True)
    if seconds and made.peak_bytes < psutil.virtual_memory().available:
        for one in every:
            for line in time_lines(one, seconds / len(every)):
                console.print(f"  {line}", markup=False, soft_wrap=True)
    return fits


def smaller(operation: str, source: Path, values: Mapping[str, Any], room: int) -> str:
    """What to change so that it fits, in words."""
    given, assumed = settings_for(operation, values)
    for changed, length in less(given, "prompt" in assumed or bool(getattr(given, "prompt", ""))):
        tried = {**values, **changed}
        if length < PROMPT:
            tried.pop("prompt", None)
        made = max(looked(operation, source, tried, length), key=lambda one: one.peak_bytes)
        if made.peak_bytes <= room:
            words = [f"{name}={value}" for name, value in changed.items()]
            words += [f"a prompt of {length} tokens"] if length < PROMPT else []
            return f"With {' and '.join(words)} it takes {size(made.peak_bytes)}."
    return "Nothing that was tried fits: a smaller model, or a machine with more memory."


def less(given: Any, prompted: bool) -> Iterator[tuple[dict[str, Any], int]]:
    """(settings that take less, tokens of the prompt), the smallest change first; each beside those before it."""
    changed: dict[str, Any] = {}
    for name in HALVED:
        value, least = getattr(given, name, None), 8 if "length" in name else 1
        for part in (2, 4, 8):
            if isinstance(value, int) and value // part >= least:
                changed = {**changed, name: value // part}
                yield changed, PROMPT
    if getattr(given, "dtype", "") in ("float32", None) and _takes_bfloat16(given):
        changed = {**changed, "dtype": "bfloat16"}
        yield changed, PROMPT
    if prompted:
        yield changed, PROMPT // 2
        yield changed, PROMPT // 4


def _takes_bfloat16(given: Any) -> bool:
    try:
        dataclasses.replace(given, dtype="bfloat16")
    except (SettingsError, TypeError):
        return False
    return True


def time_lines(made: Looked, seconds: float) -> list[str]:
    """How long each kind of pass takes here, and all of them where their number is known."""
    lms = [load() for load in made.look.loaders]
    lines = []
    for one in made.passes:
        took = seconds_of(one, lms, seconds / len(made.passes))
        line = f"{one.what}: {took:.2g} s a pass"
        if one.times is None:
            lines.append(f"{line}; how many there are depends on what it finds")
        else:
            lines.append(f"{line}, {one.times:,} of them: {duration(took * one.times)}" if one.times > 1 else line)
    return lines

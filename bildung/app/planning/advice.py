"""Which settings fit into a memory, the smallest change first.

    batch_size, micro_steps   fewer rows at a time: the same training
    recompute                 activations computed again: the same training, up to a third slower
    optimizer                 adamw_8bit: a quarter of the state
    max_length                shorter rows
    tune lora                 fewer parameters, in place of all
    quantize to nf4 first     a quarter of the frozen weights
    parallel                  several devices

Each is tried on paper; what helps stays when the next one is tried. When something fits, changes that turn out not to
be needed are taken back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bildung.core.progress import size

SHORTEST = 64  # tokens of a row, below which nothing is proposed
Planner = Callable[[str, Any], int]  # (operation, settings) -> peak bytes


def what_fits(operation: str, given: Any, peak: int, room: int, planned: Planner) -> tuple[dict[str, Any], int] | None:
    """(the settings to change, the peak then), "operation" among them if another one is needed; None if nothing fits.

    planned: the peak of an operation with other settings."""
    kept: dict[str, Any] = {}
    for change in changes(operation, given):
        tried = {**kept, **change}
        found = planned(tried.get("operation", operation), with_changes(given, tried))
        if found <= room:
            return _without_needless(operation, given, tried, found, room, planned)
        if found < peak * 0.98:  # it helps, and not enough
            kept, peak = tried, found
    return None


def changes(operation: str, given: Any) -> Iterator[dict[str, Any]]:
    """One after the other, each to be made beside those that helped."""
    rows, micro_steps = given.batch_size, given.micro_steps
    for parts in (n for n in range(2, rows + 1) if rows % n == 0):
        yield {"batch_size": rows // parts, "micro_steps": micro_steps * parts}
    if given.recompute == "none":
        yield {"recompute": "mlp"}
        yield {"recompute": "blocks"}
    trains_all = operation == "tune full" or operation.startswith("pretrain")
    if given.optimizer == "adamw" and given.weights == "fp32":
        yield {"optimizer": "adamw_8bit"}
        if trains_all:
            yield {"optimizer": "paged_adamw"}
    length = getattr(given, "max_length", 0) // 2
    while length >= SHORTEST:
        yield {"max_length": length}
        length //= 2
    if operation == "tune full":
        yield {"operation": "tune lora"}
    if operation in ("tune full", "tune lora"):
        yield {"operation": "tune qlora"}


def with_changes(given: Any, tried: Mapping[str, Any]) -> Any:
    """The settings with some of them changed."""
    return dataclasses.replace(given, **{name: value for name, value in tried.items() if name != "operation"})


def _without_needless(
    operation: str, given: Any, tried: dict[str, Any], found: int, room: int, planned: Planner
) -> tuple[dict[str, Any], int]:
    """The same without those changes, the greatest first, that it fits without too."""
    together = [{"batch_size", "micro_steps"}, {"recompute"}, {"optimizer"}, {"max_length"}]
    for names in reversed(together):
        fewer = {name: value for name, value in tried.items() if name not in names}
        if len(fewer) in (0, len(tried)):
            continue
        peak = planned(fewer.get("operation", operation), with_changes(given, fewer))
        if peak <= room:
            tried, found = fewer, peak
    return tried, found


def devices(made: Any, ranks: Sequence[int], room: int) -> str:
    """The fewest devices that are enough, in words; "" when none of these numbers is."""
    for count in sorted(ranks):
        for kind in ("zero1", "zero2", "zero3"):
            if count > 1 and made.on(count, kind) <= room:
                return f"{count} devices with --parallel {kind} are enough ({size(made.on(count, kind))} each)."
    return ""


def in_words(operation: str, tried: Mapping[str, Any], peak: int) -> str:
    """What to change, as it is written on the command line."""
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in tried.items() if name != "operation")
    other = tried.get("operation", operation)
    if other == "tune qlora":
        return f"`bildung quantize ... --method nf4` first, then `bildung tune qlora` {flags} takes {size(peak)}."
    said = f"`bildung {other}` {flags} takes {size(peak)}".replace("`  ", "` ")
    same = set(tried) <= {"batch_size", "micro_steps", "recompute"}
    return f"{said}: the same training." if same else f"{said}."

"""Reading and changing a part of an activation: what `observe` and `intervene` do where a selection says which part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from bildung.core.errors import BadIntervention, NoSuchSite
from bildung.model.selection import Place, Selection

Tap = Callable[[Tensor], Tensor | None]


class Places(Protocol):
    """What is being read: see taps.Taps."""

    def place(self, site: str, keys: bool = False) -> Place | None:
        """What is read where `site` is."""


class Seen(dict[str, Tensor]):
    """What `observe` saw, site -> tensor. gradients: site -> that of whatever was backpropagated, where asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[str, Tensor] = {}


def check_kept(site: str, changed: Tensor, x: Tensor) -> None:
    """Raises BadIntervention unless it is a tensor whose shape and type are what they were."""
    if not isinstance(changed, Tensor):
        raise BadIntervention(
            f"the intervention at {site} returned {changed!r}, of type {type(changed).__name__}; it must return a "
            "tensor, or None to leave things as they are."
        )
    if changed.shape != x.shape or changed.dtype != x.dtype:
        raise BadIntervention(
            f"the intervention at {site} returned {tuple(changed.shape)} {changed.dtype}; "
            f"it must keep the shape and type it was given: {tuple(x.shape)} {x.dtype}."
        )


def never_read(site: str, selection: Selection, place: Place | None) -> NoSuchSite:
    """The error for positions that no pass had."""
    read = "" if place is None else f"; the last pass ended with position {place.past + place.length - 1}"
    return NoSuchSite(f"{site}{selection.text} was never read{read}. Positions count from 0.")


class Chosen:
    """A tap on a part of an activation: the function gets the part, and what it returns is put in its place."""

    def __init__(self, taps: Places, site: str, shape: str, selection: Selection, function: Tap):
        selection.axes(site, shape)  # refuses what does not fit, before anything runs
        self.taps, self.site, self.shape, self.selection, self.function = taps, site, shape, selection, function
        self.ran = self.met = False

    def __call__(self, x: Tensor) -> Tensor | None:
        queries, keys = self.taps.place(self.site), self.taps.place(self.site, keys=True)
        parts = self.selection.parts(self.site, self.shape, x, queries, keys)
        self.ran, result = True, None
        for index in parts:
            self.met = True
            changed = self.function(x[index])
            if changed is not None:
                check_kept(f"{self.site}{self.selection.text}", changed, x[index])
                result = x = x.index_put(index, changed)
        return result

    def check_met(self) -> None:
        """Raises NoSuchSite if the model ran and never read a chosen position."""
        if self.ran and not self.met:
            raise never_read(self.site, self.selection, self.taps.place(self.site))


def seen_part(taps: Places, site: str, shape: str, selection: Selection, x: Tensor) -> Tensor | None:
    """The chosen part, None where this pass has none of it. Raises BadIntervention where rows would not stack."""
    parts = selection.parts(site, shape, x, taps.place(site), taps.place(site, keys=True))
    if not parts:
        return None
    rows = parts[0][0].numel()
    expected = len(selection.axes(site, shape)[0].among(len(x), "row")) if 0 in selection.axes(site, shape) else len(x)
    if len(parts) > 1 or rows != expected:
        raise BadIntervention(
            f"{site}{selection.text}: the rows of this batch have other numbers of these positions; observe them one "
            "row at a time, or the whole site."
        )
    return x[parts[0]]


def joined(before: Tensor, part: Tensor, axis: int, site: str, selection: Selection) -> Tensor:
    """What was seen with what came next, along positions."""
    others = [size for n, size in enumerate(part.shape) if n != axis]
    if before.ndim != part.ndim or [size for n, size in enumerate(before.shape) if n != axis] != others:
        raise BadIntervention(
            f"{site}{selection.text}: {tuple(part.shape)} cannot follow {tuple(before.shape)}; choose key positions, "
            "or read the passes one by one."
        )
    return torch.cat((before, part), dim=axis)


def watch(x: Tensor, keep: Callable[[Tensor], None], site: str) -> None:
    """`keep` gets the gradient at `x` when it is known."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise BadIntervention(f"gradients at {site} were asked for and none are recorded; leave torch.no_grad.")
    if not x.requires_grad:
        x.requires_grad_()  # frozen weights: here the graph begins
    x.register_hook(keep)

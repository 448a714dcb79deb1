"""The activation seam: read or change any activation of a running model by name.

    with observe(model, "layers.*.resid_post") as seen:          # read
        model(tokens)
    with intervene(model, {"layers.3.resid_post": fn}):          # write: patching, ablation, steering, lenses
        model(tokens)
    attach(model, "layers.*.mlp.out", Bottleneck(64, 8))         # a module that stays, trains and is saved

A block calls `self.taps(site, x)` at each named place; with nobody listening that is one attribute test (0.1 µs).
The names are TransformerLens's (Nanda & Bloom 2022); the shapes are the same on plain, tuned, quantized and edited
models. Why not forward hooks: a hook added after `torch.compile` is silently ignored (torch 2.13), a tap is not.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bildung.core.errors import BadIntervention, NoSuchSite, nearest

Tap = Callable[[Tensor], Tensor | None]


class Taps:
    """The listeners of one model, shared by its blocks. Belongs to the model, not to a global: DPO runs two at once."""

    def __init__(self) -> None:
        self.listeners: dict[str, tuple[Tap, ...]] = {}

    def __call__(self, site: str, x: Tensor) -> Tensor:
        """`x`, or what the listeners of `site` made of it."""
        if not self.listeners:
            return x
        for tap in self.listeners.get(site, ()):
            changed = tap(x)
            if changed is not None:
                if changed.shape != x.shape or changed.dtype != x.dtype:
                    raise BadIntervention(
                        f"the intervention at {site} returned {tuple(changed.shape)} {changed.dtype}; "
                        f"it must keep the shape and type it was given: {tuple(x.shape)} {x.dtype}."
                    )
                x = changed
        return x

    def wanted(self, *sites: str) -> bool:
        """Whether anybody listens at one of the sites (attention then takes its explicit path)."""
        return bool(self.listeners) and any(site in self.listeners for site in sites)

    @contextmanager
    def attached_only(self) -> Iterator[None]:
        """Only attached modules work inside the block; who observes or intervenes does not see what runs there."""
        before = self.listeners
        kept = {site: tuple(tap for tap in taps if _is_attached(tap)) for site, taps in before.items()}
        self.listeners = {site: taps for site, taps in kept.items() if taps}
        try:
            yield
        finally:
            self.listeners = before

    def add(self, site: str, tap: Tap) -> None:
        """Listen at a site, after those who listen already."""
        self.listeners[site] = (*self.listeners.get(site, ()), tap)

    def remove(self, site: str, tap: Tap) -> None:
        """Stop listening."""
        left = list(self.listeners[site])
        left.remove(tap)
        if left:
            self.listeners[site] = tuple(left)
        else:
            del self.listeners[site]


class Attachment(nn.Module):
    """A module attached at a site. `settings` (JSON-able) rebuilds it on load; its class must live in bildung.

    A module that needs more than what passes at its own site (a side column, a head that reads a vector below the
    logits) names other sites in `reads`; `see` is shown each of them on the way.
    """

    settings: dict[str, Any]
    reads: tuple[str, ...] = ()

    def see(self, site: str, x: Tensor) -> None:
        """Called with the activation at a site of `reads`."""


@dataclass(frozen=True)
class _Reader:
    """Shows an attachment what passes at another site."""

    module: Attachment
    site: str

    def __call__(self, x: Tensor) -> None:
        self.module.see(self.site, x)


def _is_attached(tap: Tap) -> bool:
    return isinstance(tap, Attachment | _Reader)


def sites(model: nn.Module) -> dict[str, str]:
    """Every site of the model with its shape, e.g. {"layers.0.attn.z": "B L N H"}, in forward order.

    B batch, L query length, S key length, D hidden_size, N attention heads, K key-value heads, H head_dim, F
    intermediate_size, V vocabulary, C classes. `attn.q` and `attn.k` are before the rotation; `attn.scores` after the
    mask; `mlp.in` after the norm that stands before the feed-forward layer.
    """
    _check_model(model)
    return dict(model.sites)  # type: ignore[arg-type]


def _check_model(model: object) -> None:
    if not isinstance(getattr(model, "taps", None), Taps):
        hint = (
            "give its .model" if isinstance(getattr(model, "model", None), nn.Module) else "load one with bildung.load"
        )
        raise NoSuchSite(f"a {type(model).__name__} has no activation sites, a model has; {hint}.")


def match_sites(model: nn.Module, pattern: str | Sequence[str]) -> list[str]:
    """Site names that fit one or several shell patterns. Raises NoSuchSite for a pattern that fits none."""
    names = list(sites(model))
    found: set[str] = set()
    for one in [pattern] if isinstance(pattern, str) else pattern:
        hits = fnmatch.filter(names, one)
        if not hits:
            layers = sum(name.endswith(".resid_pre") for name in names)
            raise NoSuchSite(
                f"no site fits {one!r}; this model has layers 0..{layers - 1} and sites such as {names[0]}, "
                f"{names[1]}, {names[-1]}; bildung.sites(model) lists them. {nearest(one, names)}".strip()
            )
        found.update(hits)
    return [name for name in names if name in found]


@contextmanager
def observe(model: nn.Module, pattern: str | Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect activations: yields a dict that each forward pass inside the block fills with site -> tensor.

    The tensors are the model's own (not copied, not detached): gradients flow if the forward pass records them.
    A later forward pass overwrites an earlier one's.
    """
    seen: dict[str, Tensor] = {}

    def keep(site: str) -> Tap:
        def tap(x: Tensor) -> None:
            seen[site] = x

        return tap

    with _listening(model, [(site, keep(site)) for site in match_sites(model, pattern)]):
        yield seen


@contextmanager
def intervene(model: nn.Module, edits: Mapping[str, Tap]) -> Iterator[None]:
    """Change activations: pattern -> function of the activation; it returns the new one, or None to leave it.

    Functions must be pure (compile and activation checkpointing may run them again) and keep shape and dtype. Where
    several patterns fit a site, their functions apply one after the other. Patching an activation with itself changes
    nothing, bit for bit.
    """
    with _listening(model, [(site, fn) for pattern, fn in edits.items() for site in match_sites(model, pattern)]):
        yield


@contextmanager
def _listening(model: nn.Module, listeners: Sequence[tuple[str, Tap]]) -> Iterator[None]:
    taps: Taps = model.taps  # type: ignore[assignment]
    for site, tap in listeners:
        taps.add(site, tap)
    try:
        yield
    finally:
        for site, tap in listeners:
            taps.remove(site, tap)


def attach(model: nn.Module, pattern: str | Sequence[str], module: Attachment) -> dict[str, Attachment]:
    """Put a module at every matching site for good (the first takes `module`, the others copies); returns them.

    They are part of `model.parameters()` and of a saved directory (attachments.safetensors + attachments.json).
    Raises NoSuchSite; BadIntervention when a site already has one.
    """
    _check_model(model)
    attached: nn.ModuleDict = model.attached  # type: ignore[assignment]
    taps: Taps = model.taps  # type: ignore[assignment]
    made: dict[str, Attachment] = {}
    for site in match_sites(model, pattern):
        key = site.replace(".", "/")  # a ModuleDict key may hold no dot
        if key in attached:
            raise BadIntervention(f"{site} already carries a {type(attached[key]).__name__}; detach it first.")
        made[site] = module if not made else copy.deepcopy(module)
    for site, one in made.items():
        attached[site.replace(".", "/")] = one
        for other in match_sites(model, one.reads) if one.reads else ():
            taps.add(other, _Reader(one, other))
        taps.add(site, one)
    return made


def detach(model: nn.Module, pattern: str | Sequence[str]) -> None:
    """Remove attached modules again."""
    _check_model(model)
    attached: nn.ModuleDict = model.attached  # type: ignore[assignment]
    for site in match_sites(model, pattern):
        key = site.replace(".", "/")
        if key in attached:
            one: Attachment = attached[key]  # type: ignore[assignment]
            model.taps.remove(site, one)  # type: ignore[union-attr,operator]
            for other in match_sites(model, one.reads) if one.reads else ():
                model.taps.remove(other, _Reader(one, other))  # type: ignore[union-attr,operator]
            del attached[key]

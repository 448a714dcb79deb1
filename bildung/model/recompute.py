"""Activations that are not kept for the backward pass but computed again in it (Chen et al. 2016, arXiv 1604.06174).

    kept of one layer of a Llama, in numbers per token        what the backward pass computes twice
    none        ~ 8 D + 3 F
    attention   ~ 4 D + 3 F                                   q, k, v, the rotation, attention
    mlp         ~ 8 D                                         gate and up, the widest of all
    blocks          D                                         the whole layer: a third more time, and depth costs hardly
                                                              any memory

Only in training: a pass in evaluation mode that takes gradients (saliency, Fisher information) keeps everything, so who
listens there hears each activation once. Random numbers (dropout) are the same the second time, and so are those who
intervene or are attached, even if the backward pass comes when an `intervene` is over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bildung.core.errors import SettingsError
from bildung.model.taps import Taps

Recompute = Literal["none", "attention", "mlp", "blocks"]


def again(taps: Taps, function: Callable[..., Tensor], *given: Any) -> Tensor:
    """`function(*given)`, of which only `given` is kept; the backward pass calls it again."""
    if torch.compiler.is_compiling():  # a graph holds who listens when it is made
        result: Tensor = checkpoint(function, *given, use_reentrant=False)
        return result
    heard = taps.listeners.copy()

    @contextlib.contextmanager
    def as_then() -> Iterator[None]:
        now, taps.listeners = taps.listeners, heard
        try:
            yield
        finally:
            taps.listeners = now

    result = checkpoint(function, *given, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), as_then()))
    return result


def set_recompute(model: nn.Module, what: Recompute) -> None:
    """Say what the layers of a model compute again in training. Raises SettingsError for a model without layers."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "recompute")]
    if what != "none" and not layers:
        raise SettingsError(
            f"recompute = {what!r} is for stacks of Transformer layers; a {type(model).__name__} has none. Cut its "
            f"sequences shorter (bptt_length) or use a smaller batch_size with more micro_steps."
        )
    for layer in layers:
        layer.recompute = what

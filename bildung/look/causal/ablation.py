"""Ablations: what an activation is replaced by when one asks what it is for. Functions for `intervene`.

    with intervene(model, {"layers.3.attn.z[:, :, 2]": zero}): ...                   head 2 says nothing
    with intervene(model, {"layers.3.mlp.out": mean(vectors)}): ...                  it says what it always says
    with intervene(model, {"layers.3.mlp.out": resample(vectors, seed=0)}): ...      it says what it said elsewhere

Zero is a value the model may never have seen there, so what breaks may be everything behind it. The mean keeps what is
the same on all texts; a resampled one is a real activation of another text (Chan et al. 2022, causal scrubbing), the
default of circuit work. `vectors` are activations of the site, seen on other texts: its shape from its last axes on,
any number of samples before them (look/cache.py, or `observe`).
"""

# B rows, L positions, M samples

from __future__ import annotations

import torch
from torch import Tensor

from bildung.core.errors import BadIntervention
from bildung.model.taps import Tap


def zero(x: Tensor) -> Tensor:
    """Nothing."""
    return torch.zeros_like(x)


def mean(vectors: Tensor) -> Tap:
    """The mean of the samples, at every row and position; samples lie along the first axis.

    Raises BadIntervention, when it is used, for samples of another shape than the activation's last axes.
    """
    samples = _samples(vectors)
    average = samples.double().mean(0)

    def tap(x: Tensor) -> Tensor:
        _check(x, average, "mean")
        return average.to(x).expand_as(x)

    return tap


def resample(vectors: Tensor, seed: int = 0) -> Tap:
    """For every row and position one of the samples, drawn by the seed: the same ones at each call, so the function is
    pure. Raises BadIntervention as `mean`."""
    samples = _samples(vectors)

    def tap(x: Tensor) -> Tensor:
        _check(x, samples[0], "resample")
        places = x.shape[: x.ndim - samples.ndim + 1]
        drawn = torch.randint(len(samples), places, generator=torch.Generator().manual_seed(seed))
        return samples.to(x)[drawn.to(x.device)]

    return tap


def patch(value: Tensor) -> Tap:
    """Exactly this value, seen in another run: of the activation's shape, or of one that expands to it."""

    def tap(x: Tensor) -> Tensor:
        if value.ndim > x.ndim or any(a not in (1, b) for a, b in zip(value.shape[::-1], x.shape[::-1], strict=False)):
            raise BadIntervention(
                f"a value of shape {tuple(value.shape)} cannot stand for an activation of shape {tuple(x.shape)}; "
                "choose as many rows, positions and heads in both, e.g. with a selection."
            )
        return value.to(x).expand_as(x)

    return tap


def _samples(vectors: Tensor) -> Tensor:
    if vectors.ndim < 2 or not len(vectors):
        raise BadIntervention(
            f"samples of shape {tuple(vectors.shape)} were given; the first axis counts samples, of which there is at "
            "least one, the others are the activation's last."
        )
    return vectors


def _check(x: Tensor, one: Tensor, what: str) -> None:
    if one.ndim >= x.ndim or x.shape[x.ndim - one.ndim :] != one.shape:
        raise BadIntervention(
            f"{what}: one sample has the shape {tuple(one.shape)}, and the activation {tuple(x.shape)} does not end in "
            "it; flatten rows and positions of the samples into one axis: vectors.flatten(0, 1)."
        )

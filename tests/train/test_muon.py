"""Muon: equal to PyTorch's, and what an orthogonal update is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bildung.core.errors import SettingsError
from bildung.train.muon import Muon, orthogonalized

SHAPES = [(24, 40), (40, 24), (16, 16)]


def pair(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    return ours, [nn.Parameter(parameter.detach().clone()) for parameter in ours]


def same_gradients(ours, theirs, step):
    generator = torch.Generator().manual_seed(100 + step)
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()


def assert_equal_after_steps(ours, theirs, one, other):
    for step in range(5):
        same_gradients(ours, theirs, step)
        one.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale, theirs_called", [("rms", "match_rms_adamw"), ("spectral", "original")])
def test_equal_to_pytorch(scale, theirs_called):
    ours, theirs = pair(SHAPES)
    one = Muon(ours, lr=0.02, weight_decay=0.1, scale=scale)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=theirs_called)
    assert_equal_after_steps(ours, theirs, one, other)


def test_the_other_parameters_are_adamws():
    ours, theirs = pair([(6, 4), (5,)])
    one = Muon([{"params": ours, "muon": False}], lr=0.02, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1)
    assert_equal_after_steps(ours, theirs, one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_singular_values_become_about_one(shape):
    """Of a matrix whose singular values span two decades; U and Q stay."""
    generator = torch.Generator().manual_seed(1)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    rank = min(shape)
    given = left @ torch.diag(torch.logspace(0, -2, rank)) @ right
    found = orthogonalized(given).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    in_its_own_directions = left.T @ found @ right.T
    assert (in_its_own_directions - torch.diag(in_its_own_directions.diagonal())).abs().max() < 0.05


def test_rms_scale_makes_updates_as_large_as_adamws():
    """RMS 0.2 whatever the shape (Moonlight, lemma 1)."""
    for shape in SHAPES:
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        Muon([weight], lr=1.0).step()
        assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_a_vector_is_refused():
    with pytest.raises(SettingsError, match=r"\(5,\) was given"):
        Muon([nn.Parameter(torch.zeros(5))], lr=1e-3)

"""L1, gradient noise and NEFTune: what they do, and where they do not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bildung.model.taps import observe
from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import adamw
from bildung.train.regularise import add_gradient_noise, add_l1, neftune, soft_threshold


def test_soft_threshold():
    weight = torch.tensor([[-2.0, -0.5, 0.0, 0.3, 1.0]])
    soft_threshold(weight, 0.5)
    assert weight.tolist() == [[-1.5, 0, 0, 0, 0.5]]


def test_l1_beside_gradient_descent_ends_at_the_lasso():
    """Least squares with 3 of 20 true weights. At the minimum of ½·mean((xw - y)²) + λ·|w| the slope is -λ·sign(w)
    where w is not 0, and at most λ where it is. L2 leaves no weight at 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=generator)
    truth = torch.zeros(20)
    truth[[2, 7, 11]] = torch.tensor([1.0, -2.0, 0.5])
    weight = nn.Parameter(torch.full((1, 20), 0.1))

    def descend(optimizer):
        for _ in range(500):
            optimizer.zero_grad()
            (0.5 * (x @ weight[0] - x @ truth).square().mean()).backward()
            optimizer.step()
        return weight.detach()[0], weight.grad[0]

    decayed, _ = descend(torch.optim.SGD([weight], 0.1, weight_decay=0.1))
    assert decayed.count_nonzero() == 20
    optimizer = torch.optim.SGD([weight], 0.1)
    add_l1(optimizer, 0.05)
    found, slope = descend(optimizer)
    assert found.nonzero().flatten().tolist() == [2, 7, 11]
    torch.testing.assert_close(slope[found != 0], -0.05 * found[found != 0].sign(), rtol=1e-3, atol=1e-5)
    assert slope[found == 0].abs().max() < 0.05


def test_l1_leaves_vectors_alone():
    vector = nn.Parameter(torch.full((4,), 0.01))
    vector.grad = torch.zeros(4)
    optimizer = torch.optim.SGD([vector], 1.0)
    add_l1(optimizer, 1.0)
    optimizer.step()
    assert vector.tolist() == pytest.approx([0.01] * 4)


@pytest.mark.parametrize("taken", [0, 9])
def test_gradient_noise_has_the_papers_variance_and_falls(taken):
    weight = nn.Parameter(torch.zeros(100, 1000))
    optimizer = torch.optim.SGD([weight], 1.0)
    add_gradient_noise(optimizer, eta=0.3, seed=1)
    optimizer.param_groups[0]["taken"] = taken
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    noise = -weight.detach() - 2
    assert noise.std().item() == pytest.approx(math.sqrt(0.3 / (1 + taken) ** 0.55), rel=0.02)
    assert abs(noise.mean().item()) < 0.01


def test_gradient_noise_in_a_run_changes_it_the_same_way_each_time(make_model, batch_at):
    def run(eta):
        model = make_model()
        optimizer = adamw(model, 1e-2)
        if eta:
            add_gradient_noise(optimizer, eta, seed=0)
        fit(model, batch_at, clm, optimizer, steps=3)
        return model.lm_head.weight() if callable(model.lm_head.weight) else model.lm_head.weight

    assert torch.equal(run(0.1), run(0.1)) and not torch.equal(run(0.1), run(0.0))


def test_neftune_is_noise_of_its_size_in_training_only(make_model):
    model = make_model()
    tokens = torch.randint(0, 61, (4, 10), generator=torch.Generator().manual_seed(0))

    def embedded():
        with observe(model, "layers.0.resid_pre") as seen:
            model(tokens)
        return seen["layers.0.resid_pre"].detach()

    clean = embedded()
    with neftune(model, alpha=5.0):
        model.train()
        noise = embedded() - clean
        model.eval()
        assert torch.equal(embedded(), clean)
    reach = 5 / math.sqrt(10 * 24)
    assert noise.abs().max().item() <= reach + 1e-6
    assert noise.std().item() == pytest.approx(reach / math.sqrt(3), rel=0.1)
    model.train()
    assert torch.equal(embedded(), clean)  # gone with the block

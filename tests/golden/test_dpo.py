"""DPO against worked numbers: one pair by hand, torchtune's table, the invariants, and exam row 9."""

from __future__ import annotations

import math

import pytest
import torch

from bildung.align.dpo import dpo_loss

LOG2 = math.log(2)


def one(chosen=-8.0, rejected=-12.5, reference_chosen=-9.0, reference_rejected=-12.0, **how) -> float:
    """The loss of one pair: policy sums -8.0 and -12.5, reference -9.0 and -12.0, so Δ = 1.0 - (-0.5) = 1.5."""
    sums = (torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, reference_chosen, reference_rejected))
    return float(dpo_loss(*sums, **how))


def test_one_pair():
    assert one(beta=0.1) == pytest.approx(0.620957048, abs=1e-9)
    assert one(beta=0.1) == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * 1.5))), abs=1e-12)


def test_conservative_dpo_with_a_tenth_of_the_labels_wrong():
    assert one(beta=0.1, label_smoothing=0.1) == pytest.approx(0.635957048, abs=1e-9)


def test_gradient_with_respect_to_the_chosen_answers_log_probability():
    chosen = torch.tensor([-8.0], dtype=torch.float64, requires_grad=True)
    rest = (torch.tensor([x], dtype=torch.float64) for x in (-12.5, -9.0, -12.0))
    dpo_loss(chosen, *rest, beta=0.1).backward()
    assert float(chosen.grad) == pytest.approx(-0.046257015, abs=1e-9)


def test_torchtune_table():
    """torchtune's test_dpo_loss.py: logits Δ = 0, 10, 20."""
    policy_chosen, policy_rejected = torch.tensor([-0.5, -10.0, -1.0]), torch.tensor([-0.1, -30.0, -21.0])
    reference_chosen, reference_rejected = torch.tensor([-0.5, -10.1, -0.1]), torch.tensor([-0.1, -20.1, -0.1])
    loss_P = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1)
    torch.testing.assert_close(loss_P, torch.tensor([0.693147181, 0.313261688, 0.126928011]))


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_policy_equal_to_reference_is_log_2(beta, label_smoothing):
    assert one(-8.0, -12.5, -8.0, -12.5, beta=beta, label_smoothing=label_smoothing) == pytest.approx(LOG2, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_neither_overflow_nor_lose_their_gradient(dtype):
    """βΔ = ±1000: the naive -log(sigmoid(x)) is infinite at -1000."""
    chosen = torch.tensor([10000.0, -10000.0], dtype=dtype, requires_grad=True)
    zero = torch.zeros(2, dtype=dtype)
    loss_P = dpo_loss(chosen, zero, zero, zero, beta=0.1)
    assert loss_P.tolist() == [0.0, 1000.0]
    loss_P.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([0.0, -0.1])


def test_swapping_the_answers_mirrors_the_loss_and_shifting_both_changes_nothing():
    assert one(-12.5, -8.0, -12.0, -9.0) - one() == pytest.approx(0.15, abs=1e-12)  # log σ(x) - log σ(-x) = x
    assert one(-8.0 - 3, -12.5 - 3) == pytest.approx(one(), abs=1e-12)


def test_exam_row_9_optimal_policy_and_where_beta_stands():
    """π* ∝ π_ref exp(r/β) maximises E[r] - β KL(π || π_ref); β log(π*/π_ref) gives r back up to a constant; and the
    preference the pair loss then sees is σ(r_w - r_l), with β inside σ."""
    beta, reward = 0.3, torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    optimal = torch.softmax(reference.log() + reward / beta, 0)

    def objective(policy: torch.Tensor) -> float:
        return float((policy * reward).sum() - beta * (policy * (policy / reference).log()).sum())

    generator = torch.Generator().manual_seed(0)
    others = [torch.softmax(torch.randn(3, generator=generator, dtype=torch.float64), 0) for _ in range(200)]
    assert all(objective(other) < objective(optimal) for other in others)
    implicit = beta * (optimal / reference).log()
    torch.testing.assert_close(implicit - implicit[0], reward - reward[0])
    w, l = 0, 2  # noqa: E741
    loss = dpo_loss(optimal.log()[w], optimal.log()[l], reference.log()[w], reference.log()[l], beta=beta)
    assert math.exp(-float(loss)) == pytest.approx(float(torch.sigmoid(reward[w] - reward[l])))

"""Exam row 3: the gradient of the linear RNN by the backward recursion, equal to autograd to 1e-10 in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from bildung.model.recurrent import RecurrentLayer
from bildung.model.sequences import Sequences
from bildung.model.taps import Taps
from bildung.train.bptt import linear_rnn_gradients

STEPS, D, IN, OUT = 17, 5, 3, 2


def given() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"A": (D, D), "B": (D, IN), "b": (D,), "C": (OUT, D), "x": (STEPS, IN), "y": (STEPS, OUT), "h": (D,)}
    # A of spectral radius about 0.6: the numbers stay near 1, so 1e-10 says something.
    return {name: torch.randn(*shape, dtype=torch.float64) / 4 for name, shape in shapes.items()}


def by_hand(one: dict[str, Tensor], window: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    found = linear_rnn_gradients(*(one[name] for name in ("A", "B", "b", "C", "x", "y", "h")), window=window)
    gradients = found[1]
    return found[0], {"A": gradients.A_DD, "B": gradients.B_DI, "b": gradients.b_D, "C": gradients.C_OD}


def by_autograd(one: dict[str, Tensor], window: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Through the model's own layer with the identity as its activation."""
    layer = RecurrentLayer("rnn", IN, D, Taps(), "layers.0", act="identity").double()
    layer.input_proj.base.weight.data, layer.recurrent_proj.base.weight.data = one["B"], one["A"]
    layer.input_proj.bias.data = one["b"]
    C = one["C"].clone().requires_grad_()
    state, losses = (one["h"][None],), []
    for x, y in zip(one["x"].split(window or STEPS), one["y"].split(window or STEPS), strict=True):
        state = tuple(part.detach() for part in state)
        h, state = layer(x[None], state, Sequences((1, len(x))))
        losses.append((h[0] @ C.T - y).square().sum() / 2)
    torch.stack(losses).sum().backward()
    weights = {"A": layer.recurrent_proj.base.weight, "B": layer.input_proj.base.weight, "b": layer.input_proj.bias}
    return torch.stack(losses).sum(), {**{name: weight.grad for name, weight in weights.items()}, "C": C.grad}


def test_row_3_the_recursion_is_the_gradient() -> None:
    (loss, hand), (want, auto) = by_hand(given()), by_autograd(given())
    assert abs(loss - want).item() < 1e-10
    assert all((hand[name] - auto[name]).abs().max().item() < 1e-10 for name in "ABbC")


def test_row_3_truncated_the_recursion_stops_at_the_borders() -> None:
    hand, auto = by_hand(given(), window=4)[1], by_autograd(given(), window=4)[1]
    assert all((hand[name] - auto[name]).abs().max().item() < 1e-10 for name in "ABbC")
    assert (hand["A"] - by_hand(given())[1]["A"]).abs().max().item() > 1e-3


def test_row_3_first_state() -> None:
    one = given()
    start = one["h"].clone().requires_grad_()
    h, loss = start, torch.zeros((), dtype=torch.float64)
    for x, y in zip(one["x"], one["y"], strict=True):
        h = one["A"] @ h + one["B"] @ x + one["b"]
        loss = loss + (one["C"] @ h - y).square().sum() / 2
    loss.backward()
    _, gradients = linear_rnn_gradients(*(one[name] for name in ("A", "B", "b", "C", "x", "y", "h")))
    assert (gradients.start_D - start.grad).abs().max().item() < 1e-10

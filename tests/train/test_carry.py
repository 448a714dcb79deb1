"""Truncated back-propagation through time: the state goes on, the gradient does not, and resuming is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bildung.core.errors import TrainingError
from bildung.data.streams import Streams, Window
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.rnn import RecurrentLM
from bildung.train.carry import Carry
from bildung.train.fit import fit
from bildung.train.optim import adamw


def model_of(cell: str = "lstm", **changes: object) -> RecurrentLM:
    keys = {"model_type": "rnn", "cell": cell, "vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, **changes}
    model: RecurrentLM = build(from_dict(keys), seed=3)
    return model


def streams() -> Streams:
    return Streams(np.random.default_rng(0).integers(0, 40, 500), batch_size=3, window=6, seed=0)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_the_state_goes_on_and_the_gradient_does_not(cell: str) -> None:
    model, objective = model_of(cell).double(), Carry()
    one, two = streams()(0), streams()(1)
    objective(model, one)
    objective(model, two).total.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    # By hand: read both windows in one go, but with the state between them cut off.
    model.zero_grad()
    state = model.kv_cache(3, 12)
    model.hidden(one.tokens_BL[:, :-1], kv_cache=state)
    state.detach()
    logits = model(two.tokens_BL[:, :-1], kv_cache=state)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), two.tokens_BL[:, 1:].flatten(), reduction="sum")
    want.backward()
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).abs().max().item() < 1e-6, name  # log softmax is taken in float32
    # And a state there is: from an empty one the loss is another.
    assert abs(Carry()(model, Window(two.tokens_BL, first=True)).total - want).item() > 1e-3


def test_a_window_without_the_state_before_it_is_refused() -> None:
    with pytest.raises(TrainingError, match="the state of the window before"):
        Carry()(model_of(), streams()(3))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_run_cut_in_two_is_the_run_in_one_bit_for_bit(cell: str, tmp_path: Path) -> None:
    def train(out: Path, *, steps: int) -> RecurrentLM:
        model, objective = model_of(cell, weight_drop=0.3, hidden_dropout=0.1), Carry()
        optimizer = adamw(model, 1e-2)
        given = {"steps": steps, "out": out, "checkpoint_every": 5, "clip": 1.0, "carried": objective.carried}
        fit(model, streams(), objective, optimizer, **given)
        return model

    whole = train(tmp_path / "whole", steps=10)
    train(tmp_path / "cut", steps=5)
    resumed = train(tmp_path / "cut", steps=10)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)

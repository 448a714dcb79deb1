"""Parameter groups and schedules."""

from __future__ import annotations

import math

import pytest

from bildung.core.errors import SettingsError, TrainingError
from bildung.train.optim import adamw, constant, cosine, inverse_sqrt, linear, schedule


def test_vectors_are_not_decayed_and_frozen_parameters_not_there(make_model):
    model = make_model()
    model.lm_head.requires_grad_(False)
    decayed, kept = adamw(model, 1e-3, weight_decay=0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters())) - 1


def test_nothing_trainable_is_an_error(make_model):
    with pytest.raises(TrainingError, match="nothing would be trained"):
        adamw(make_model().requires_grad_(False), 1e-3)


def test_a_learning_rate_of_zero_is_an_error(make_model):
    with pytest.raises(SettingsError, match="above 0"):
        adamw(make_model(), 0.0)


def test_schedules():
    assert [constant()(s) for s in (0, 9)] == [1, 1]
    assert [constant(4)(s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [linear(10, 2)(s) for s in (0, 1, 2, 6, 9, 10)] == pytest.approx([0.5, 1, 1, 0.5, 0.125, 0])
    assert [cosine(10, 2)(s) for s in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert cosine(10, 0, floor=0.1)(10) == pytest.approx(0.1)
    assert schedule("linear", 10, 2)(6) == linear(10, 2)(6)


def test_the_2017_schedule_is_equation_3():
    """d_model^-0.5 min(step^-0.5, step · warmup^-1.5), steps counted from 1, as a share of its top."""
    for step in range(1, 50):
        rate = min(step**-0.5, step * 8**-1.5) / 8**-0.5
        assert inverse_sqrt(8)(step - 1) == schedule("inverse_sqrt", 99, 8)(step - 1) == pytest.approx(rate)


def test_a_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(SettingsError, match="0 to 10"):
        schedule("cosine", 10, 11)


def test_warmup_stable_decay():
    line = schedule("wsd", 20, 2, 0.25)
    assert [line(step) for step in (0, 1, 2, 14, 15)] == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert [line(step) for step in (16, 17, 18, 19)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    root = schedule("wsd_sqrt", 20, 2, 0.25)
    assert [root(step) for step in (15, 16, 19)] == pytest.approx([1.0, 1 - math.sqrt(0.2), 1 - math.sqrt(0.8)])
    with pytest.raises(SettingsError, match="more than all 10 steps"):
        schedule("wsd", 10, 3, 0.8)

"""A step: spikes are skipped and said, float16's loss is scaled, a batch that does not fit is explained."""

from __future__ import annotations

import json

import pytest
import torch

from bildung.core.errors import TrainingError
from bildung.train.fit import LossSum, fit
from bildung.train.loss_scale import GROW_AFTER, START, loss_scale
from bildung.train.objectives import clm
from bildung.train.optim import adamw
from bildung.train.plan import any_objective, plan


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def spiky(batch_at, at, times=1e4):
    """Batches of which number `at` has so much loss; and the objective that sees it."""

    def batches(number):
        batch = batch_at(number)
        object.__setattr__(batch, "times", times if number == at else 1.0)
        object.__setattr__(batch, "to", lambda device, batch=batch: batch)
        return batch

    def objective(model, batch):
        loss = clm(model, batch)
        return LossSum(loss.total * batch.times, loss.count)

    return batches, objective


def test_a_spike_is_skipped_and_logged(make_model, batch_at, capsys):
    model, seen = make_model(), []
    batches, objective = spiky(batch_at, 12)
    optimizer = adamw(model, 1e-3)
    optimizer.register_step_post_hook(lambda *_: seen.append(weights(model)))
    history = fit(model, batches, objective, optimizer, steps=14, spike=20.0)
    assert len(seen) == 13
    assert [row["step"] for row in history.rows if row.get("skipped")] == [13] == history.summary()["skipped_steps"]
    row = history.rows[12]
    assert row["spike"] > 20 and row["grad_norm"] > 20 * history.rows[11]["grad_norm"]
    assert "step 13: the gradient norm" in capsys.readouterr().err


def test_without_the_guard_or_enough_steps_to_compare_with_it_is_made(make_model, batch_at):
    for at, spike in ((12, None), (5, 20.0)):
        model = make_model()
        batches, objective = spiky(batch_at, at)
        assert not any("skipped" in row for row in fit(model, batches, objective, adamw(model, 1e-3), steps=13).rows)
        assert spike is None or not any(
            "skipped" in row for row in fit(model, batches, objective, adamw(model, 1e-3), steps=7, spike=spike).rows
        )


def test_what_counts_as_a_spike_survives_a_resume(make_model, batch_at, tmp_path):
    """The median is over steps from before the kill, which only the log remembers."""
    batches, objective = spiky(batch_at, 12)

    def run(out, steps):
        model = make_model()
        given = dict(steps=steps, spike=20.0, out=out, checkpoint_every=4)
        return model, fit(model, batches, objective, adamw(model, 1e-3), **given)

    straight, history = run(tmp_path / "straight", 14)
    run(tmp_path / "halves", 12)
    resumed, again = run(tmp_path / "halves", 14)
    assert all(map(torch.equal, weights(straight), weights(resumed)))
    assert [row.get("spike") for row in history.rows] == [row.get("spike") for row in again.rows]
    assert history.rows[12]["skipped"] == 1


def test_the_loss_scale_is_that_of_gradscaler():
    """Step by step against torch.amp.GradScaler, on a sequence of overflows and 2000 steps without."""
    scaler = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=GROW_AFTER)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.1)
    rows = []
    for number in range(GROW_AFTER + 2010):
        scale = loss_scale(rows)
        loss = scaler.scale((parameter * (float("inf") if number in (0, 3, 4) else 1.0)).sum())
        assert scaler.get_scale() == scale, number
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        rows.append({"step": number + 1, "loss_scale": scale, **({"overflow": 1} if number in (0, 3, 4) else {})})
    assert loss_scale(rows) == START / 8 * 4


def test_an_overflowing_gradient_skips_the_step_and_halves_the_scale(make_model, batch_at, tmp_path):
    model = make_model()
    clm(model, batch_at(0)).total.backward()
    largest = model.model.norm.weight.grad.abs().max() * START * 0.75  # halved, it fits
    model.model.norm.weight.register_hook(lambda grad: torch.where(grad.abs() > largest, torch.inf, grad))
    before, made = weights(model), []
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    optimizer.register_step_post_hook(lambda *_: made.append(weights(model)))
    history = fit(model, lambda _: batch_at(0), clm, optimizer, steps=3, scale_loss=True, out=tmp_path)
    first, *others = history.rows
    assert (first["overflow"], first["skipped"], first["loss_scale"]) == (1, 1, START) and "grad_norm" not in first
    assert [row["loss_scale"] for row in others] == [START / 2] * 2 and len(made) == 2
    assert not all(map(torch.equal, before, made[0]))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no Infinity


def test_scaling_by_a_power_of_two_changes_nothing(make_model, batch_at):
    one, other = make_model(), make_model()
    fit(one, batch_at, clm, torch.optim.SGD(one.parameters(), 0.1), steps=3)
    fit(other, batch_at, clm, torch.optim.SGD(other.parameters(), 0.1), steps=3, scale_loss=True)
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_no_scale_is_small_enough():
    with pytest.raises(TrainingError, match="overflow in float16 even with the loss scaled"):
        loss_scale([{"step": 40, "loss_scale": 2.0**-14, "overflow": 1}])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_a_batch_that_does_not_fit_says_what_would(make_model, batch_at, monkeypatch, error):
    model = make_model()
    enough = plan(model, any_objective, (2, 16), micro_steps=2, runtime=0, length=16).peak_bytes

    def objective(model, batch):
        raise error

    monkeypatch.setattr("bildung.train.too_large.room_of", lambda device: enough)
    monkeypatch.setattr("bildung.train.too_large.RUNTIME", 0)
    with pytest.raises(TrainingError, match=r"step 1, micro-batch 0: a batch of 4 rows of 16 tokens does not fit") as e:
        fit(model, batch_at, objective, adamw(model, 1e-3), steps=1, micro_steps=2)
    assert e.value.__cause__ is error
    assert "Planned are weights" in str(e.value) and "the largest part is activations" in str(e.value)
    assert "batch_size 2 with micro_steps 4 is the same training in about" in str(e.value)


def test_other_errors_pass(make_model, batch_at):
    model = make_model()

    def objective(model, batch):
        raise RuntimeError("shapes do not agree")

    with pytest.raises(RuntimeError, match=r"^shapes do not agree$"):
        fit(model, batch_at, objective, adamw(model, 1e-3), steps=1)

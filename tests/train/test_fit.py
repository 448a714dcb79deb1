"""The loop: exact accumulation, exact resume, and loud failure."""

from __future__ import annotations

import json
import os
import signal
from functools import partial

import pytest
import torch
from torch import nn

from bildung.core.errors import TrainingError
from bildung.data.batches import Batch
from bildung.train.fit import LossSum, fit, mean_loss
from bildung.train.objectives import clm
from bildung.train.optim import adamw, constant, cosine
from tests.processes import START
from tests.train import long_run

TIMING = {"seconds", "seconds_left", "tokens_per_second"}


def untimed(rows):
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def parts(batch, size):
    """A batch cut into batches of `size` rows."""
    tensors = (batch.tokens_BL, batch.loss_mask_BL, batch.keep_BL, batch.positions_BL)
    return [Batch(*(t[start : start + size] for t in tensors)) for start in range(0, len(tensors[0]), size)]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(one, other, exactly=True):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0 if exactly else 1e-5, msg=name)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_micro_steps_are_the_same_step(make_model, batch_at, clip):
    """Rows of one batch have unequal numbers of targets, so a mean of means would differ."""
    whole, cut = make_model(), make_model()
    one = fit(whole, batch_at, clm, torch.optim.SGD(whole.parameters(), 0.1), steps=3, clip=clip)
    pieces = [piece for n in range(3) for piece in parts(batch_at(n), 1)]
    other = fit(cut, pieces.__getitem__, clm, torch.optim.SGD(cut.parameters(), 0.1), steps=3, micro_steps=4, clip=clip)
    assert_equal_weights(weights(whole), weights(cut), exactly=False)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert {**untimed([b])[0], "loss": 0, "grad_norm": 0} == {**untimed([a])[0], "loss": 0, "grad_norm": 0}
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_a_step_is_the_gradient_of_the_mean(make_model, batch_at):
    fitted, plain = make_model(), make_model()
    fit(fitted, batch_at, clm, torch.optim.SGD(fitted.parameters(), 0.1), steps=1)
    loss = clm(plain, batch_at(0))
    (loss.total / loss.count).backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    assert_equal_weights(weights(fitted), weights(plain), exactly=False)


def test_clipping_bounds_the_step_and_reports_the_norm_before(make_model, batch_at):
    model = make_model()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    history = fit(model, batch_at, clm, torch.optim.SGD(model.parameters(), 1.0), steps=1, clip=0.01)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert history.rows[0]["grad_norm"] > 0.01
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_2n_steps_are_n_steps_resumed_for_n_more(make_lora, batch_at, tmp_path):
    """Weights, moments, dropout, schedule, counters and log: all bit-equal."""

    def run(out, steps):
        model = make_lora(dropout=0.3)
        optimizer = adamw(model, 1e-2, weight_decay=0.1)
        evaluate = partial(mean_loss, objective=clm, batches=[batch_at(99)])
        settings = dict(steps=steps, schedule=cosine(8, 2), clip=0.5, seed=7, evaluate=evaluate, evaluate_every=2)
        history = fit(model, batch_at, clm, optimizer, **settings, patience=50, out=out, checkpoint_every=4)
        return weights(model), history, optimizer.state_dict()["state"]

    straight, history, moments = run(tmp_path / "straight", 8)
    run(tmp_path / "halves", 4)
    resumed, resumed_history, resumed_moments = run(tmp_path / "halves", 8)
    assert_equal_weights(straight, resumed)
    for index, state in moments.items():
        assert_equal_weights(state, resumed_moments[index])
    assert untimed(history.rows) == untimed(resumed_history.rows)
    assert len(history.rows) == 9 and history.rows[0]["step"] == 0
    assert history.counters() | {"seconds": 0} == resumed_history.counters() | {"seconds": 0}
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "halves")]
    assert untimed(map(json.loads, logs[0])) == untimed(map(json.loads, logs[1])) == untimed(history.rows)


def test_a_run_that_was_finished_is_not_trained_again(make_lora, batch_at, tmp_path):
    """A kill between the last step and the end of the operation (saving, measuring) costs no training."""
    first, second = make_lora(), make_lora()
    history = fit(first, batch_at, clm, adamw(first, 1e-2), steps=3, out=tmp_path, checkpoint_every=2)
    again = fit(second, pytest.fail, clm, adamw(second, 1e-2), steps=3, out=tmp_path, checkpoint_every=2)
    assert again == history
    assert_equal_weights(weights(first), weights(second))


def test_dropout_differs_between_steps_and_seeds(make_lora, batch_at):
    def losses(seed):
        model = make_lora(dropout=0.5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.3)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-12)
        return [row["loss"] for row in fit(model, lambda n: batch_at(0), clm, optimizer, steps=3, seed=seed).rows]

    assert losses(1) == losses(1)
    assert len(set(losses(1) + losses(2))) == 6


def test_the_callers_random_state_is_left_alone(make_lora, batch_at):
    model = make_lora()
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    fit(model, batch_at, clm, adamw(model, 1e-3), steps=1)
    assert torch.rand(1) == expected


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    """kill -9 while step 6 is being worked on, after the checkpoint of step 4."""

    def run(out, kill_after):
        heard, says = START.Pipe(duplex=False)
        process = START.Process(target=long_run.main, args=(out, says))
        process.start()
        says.close()
        if kill_after is not None:
            while heard.recv() < kill_after:
                pass
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        return process.exitcode

    assert run(tmp_path / "whole", None) == 0
    assert run(tmp_path / "killed", 5) == -signal.SIGKILL
    assert run(tmp_path / "killed", None) == 0
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert untimed(map(json.loads, logs[0])) == untimed(map(json.loads, logs[1]))


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(make_lora, batch_at, tmp_path, capfd):
    model = make_lora()

    def interrupted(n):
        if n == 2:  # which is made while the second step is
            signal.raise_signal(signal.SIGINT)
        return batch_at(n)

    with pytest.raises(KeyboardInterrupt):
        fit(model, interrupted, clm, adamw(model, 1e-3), steps=5, out=tmp_path, checkpoint_every=100)
    assert "stopping after this step" in capfd.readouterr().err
    resumed, straight = make_lora(), make_lora()
    asked = []
    fit(resumed, lambda n: asked.append(n) or batch_at(n), clm, adamw(resumed, 1e-3), steps=5, out=tmp_path)
    fit(straight, batch_at, clm, adamw(straight, 1e-3), steps=5)
    assert asked in ([2, 3, 4], [3, 4])
    assert_equal_weights(weights(resumed), weights(straight))


def test_early_stopping_puts_the_best_weights_back(make_model, batch_at):
    model, seen, losses = make_model(), [], iter([3.0, 2.0, 2.5, 2.4, 1.0])

    def evaluate(model):
        seen.append(weights(model))
        return {"loss": next(losses)}

    settings = dict(steps=100, evaluate=evaluate, evaluate_every=3, patience=2)
    history = fit(model, batch_at, clm, adamw(model, 1e-2), **settings)
    assert history.steps == 9 and history.best_step == 3 and history.best_loss == 2.0
    assert_equal_weights(weights(model), seen[1])
    assert not torch.equal(seen[1]["lm_head.base.weight"], seen[3]["lm_head.base.weight"])
    assert history.summary()["held_out_loss_best"] == 2.0


def test_tokens_and_targets_are_counted_without_padding(make_model, batch_at):
    model = make_model()
    history = fit(model, batch_at, clm, adamw(model, 1e-3), steps=2)
    assert history.tokens_seen == sum(batch_at(n).num_tokens for n in range(2))
    assert history.trained_tokens == sum(batch_at(n).num_targets for n in range(2)) < history.tokens_seen


def test_the_learning_rate_follows_the_schedule(make_model, batch_at):
    model = make_model()
    history = fit(model, batch_at, clm, adamw(model, 0.1), steps=4, schedule=constant(warmup=4))
    assert [row["lr"] for row in history.rows] == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_metrics_of_the_objective_are_logged_as_means(make_model, batch_at):
    def objective(model, batch):
        loss = clm(model, batch)
        return LossSum(loss.total, loss.count, {"twos": 2.0 * loss.count})

    model = make_model()
    assert fit(model, batch_at, objective, adamw(model, 1e-3), steps=1, micro_steps=2).rows[0]["twos"] == 2.0


@pytest.mark.parametrize(("every", "kept"), [(0, "Nothing is kept"), (2, "learned up to step 2 is kept")])
def test_a_loss_that_is_no_number_names_the_step_and_what_is_kept(make_model, batch_at, tmp_path, every, kept):
    model = make_model()

    def objective(model, batch):
        calls.append(batch)
        loss = clm(model, batch)
        return LossSum(loss.total * (float("nan") if len(calls) == 6 else 1), loss.count)

    calls = []
    before = [weights(model)]
    optimizer = adamw(model, 1e-3)
    optimizer.register_step_post_hook(lambda *_: before.append(weights(model)))
    with pytest.raises(TrainingError, match=f"step 3, micro-batch 1: the loss is nan.*{kept}"):
        fit(model, batch_at, objective, optimizer, steps=5, micro_steps=2, out=tmp_path, checkpoint_every=every)
    assert len(before) == 3
    assert_equal_weights(weights(model), before[-1])  # no step was made with it


def test_an_exploding_gradient_names_the_step(make_model, batch_at):
    model = make_model()
    model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match="step 1: the gradient norm is"):
        fit(model, batch_at, clm, adamw(model, 1e-3), steps=1)


def test_nothing_to_learn_is_an_error(make_model, batch_at):
    model, batch = make_model(), batch_at(0)
    batch.loss_mask_BL.zero_()
    with pytest.raises(TrainingError, match="step 1: no token of its batch is a target"):
        fit(model, lambda n: batch, clm, adamw(model, 1e-3), steps=1)
    with pytest.raises(TrainingError, match="no target"):
        mean_loss(model, clm, [batch])


def test_a_checkpoint_of_another_run_is_refused(make_model, make_lora, batch_at, tmp_path):
    model = make_lora()
    fit(model, batch_at, clm, adamw(model, 1e-3), steps=1, out=tmp_path, checkpoint_every=1)
    other = make_model()
    with pytest.raises(TrainingError, match="from another run"):
        fit(other, batch_at, clm, adamw(other, 1e-3), steps=2, out=tmp_path)


def test_patience_without_anything_to_watch_is_an_error(make_model, batch_at):
    model = make_model()
    with pytest.raises(TrainingError, match="held-out"):
        fit(model, batch_at, clm, adamw(model, 1e-3), steps=1, patience=1)

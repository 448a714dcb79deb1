"""DPO as an operation: starts at log 2, learns, is saved, resumes, and refuses what cannot work."""

from __future__ import annotations

import json
import math

import pytest
import torch

import bildung
from bildung.align import dpo as module
from bildung.align.dpo import Settings, check_start, dpo, dpo_objective
from bildung.align.preference import frozen, policy_logprobs, without_delta
from bildung.core.errors import DataError, NoSuchLinear, SettingsError, TrainingError
from bildung.model.linear import replace_stores
from bildung.model.quantized import Nf4
from bildung.tune.lora import Settings as LoraSettings
from bildung.tune.lora import add_lora, lora
from bildung.tune.merge import Settings as MergeSettings
from bildung.tune.merge import merge

LOG2 = math.log(2)


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_step_is_log_2_to_the_last_bit_and_the_margin_grows(
    tiny_lm_directory, tmp_path, given, precompute, full, precision
):
    given |= dict(precompute=precompute, full=full, precision=precision, dropout=0.3, steps=6)
    record = dpo(tiny_lm_directory, tmp_path / "out", Settings(**given))
    first, *_, last = rows(tmp_path / "out")
    assert first["loss"] == pytest.approx(LOG2, abs=1e-7) and first["margin"] == 0 and first["drift"] == 0
    assert last["loss"] < LOG2 and last["margin"] > 0 and last["accuracy"] > 0 and last["drift"] > 0
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=1e-5)
    assert record.measured["loss_at_start"] == pytest.approx(LOG2, abs=1e-7)
    assert record.measured["reference"].startswith("computed once" if precompute else "computed in every")
    assert record.trained_tokens > 0 and any("no chosen and rejected" in note for note in record.notes)


def test_remembering_the_reference_changes_nothing(tiny_lm_directory, tmp_path, given):
    losses = []
    for precompute in (True, False):
        out = tmp_path / str(precompute)
        dpo(tiny_lm_directory, out, Settings(**given | dict(precompute=precompute, steps=8)))
        losses.append([row["loss"] for row in rows(out)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_packed_and_padded_train_the_same(tiny_lm_directory, tmp_path, given):
    losses = []
    for pack in (True, False):
        dpo(tiny_lm_directory, tmp_path / str(pack), Settings(**given | dict(pack=pack)))
        losses.append([row["loss"] for row in rows(tmp_path / str(pack))])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_micro_steps_are_one_batch(tiny_lm_directory, tmp_path, given):
    losses = []
    for size, micro in ((4, 1), (1, 4)):
        out = tmp_path / str(micro)
        dpo(tiny_lm_directory, out, Settings(**given | dict(batch_size=size, micro_steps=micro)))
        losses.append([row["loss"] for row in rows(out)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_held_out_pairs_are_measured_before_and_after_and_not_trained(tiny_lm_directory, tmp_path, given):
    record = dpo(tiny_lm_directory, tmp_path / "out", Settings(**given | dict(held_out=2, steps=4)))
    assert record.measured["pairs"] == 4
    assert record.measured["held_out_margin_first"] == 0 and record.measured["held_out_accuracy_first"] == 0
    assert record.measured["held_out_margin_last"] != 0
    assert record.measured["held_out_loss_first"] == pytest.approx(LOG2, abs=1e-7)


def test_the_saved_adapter_is_the_trained_policy_and_its_base_the_reference(tiny_lm_directory, tmp_path, given, pairs):
    record = dpo(tiny_lm_directory, tmp_path / "out", Settings(**given | dict(steps=6)))
    policy, reference = bildung.load(tmp_path / "out"), bildung.load(tiny_lm_directory)
    answers = pairs([0, 1, 2, 3, 4, 5])
    with torch.no_grad():
        ratio_S = policy_logprobs(policy.model, answers) - policy_logprobs(reference.model, answers)
    chosen, rejected = ratio_S.chunk(2)
    assert (chosen - rejected).mean() > 0
    assert (tmp_path / "out" / "adapter_config.json").exists() and record.operation == "align dpo"


def test_a_tuned_adapter_is_the_reference_with_its_delta(tiny_lm_directory, tmp_path, given, logits):
    """The reference is the tuned model, not its base; merging gives the same model as the adapter does."""
    talks = tmp_path / "talks.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    talks.write_text(json.dumps(row) + "\n")
    small = dict(data=str(talks), max_length=96, steps=3, learning_rate=1e-1, precision="fp32", rank=2)
    lora(tiny_lm_directory, tmp_path / "tuned", LoraSettings(**small))
    record = dpo(tmp_path / "tuned", tmp_path / "out", Settings(**given))
    assert record.measured["loss_at_start"] == pytest.approx(LOG2, abs=1e-7)
    merge(tmp_path / "out", tmp_path / "merged", MergeSettings())
    torch.testing.assert_close(logits(bildung.load(tmp_path / "out")), logits(bildung.load(tmp_path / "merged")))


def test_dpo_over_a_4_bit_base_trains_the_delta_only(tiny_lm, pairs):
    replace_stores(tiny_lm.model, "all", lambda linear: Nf4.quantize(linear.base.dense()))
    add_lora(tiny_lm.model, LoraSettings(data="none"), "dpo")
    objective = dpo_objective(without_delta("dpo"))
    assert check_start(tiny_lm.model, objective, pairs([0, 1])) == pytest.approx(LOG2, abs=1e-7)
    objective(tiny_lm.model, pairs([0, 1])).total.backward()
    trained = {name for name, parameter in tiny_lm.model.named_parameters() if parameter.grad is not None}
    assert trained and all(".deltas.dpo." in name for name in trained)


def test_another_reference_is_noticed_before_the_first_step(tiny_lm, pairs):
    objective = dpo_objective(frozen(bildung.build(tiny_lm.config, seed=9)))
    with pytest.raises(TrainingError, match="must be log 2"):
        check_start(tiny_lm.model, objective, pairs([0, 1]))


def test_a_killed_run_ends_in_the_same_result(tiny_lm_directory, tmp_path, given, monkeypatch):
    given |= dict(steps=6, checkpoint_every=2, dropout=0.1)
    dpo(tiny_lm_directory, tmp_path / "whole", Settings(**given))
    real, calls = module.policy_logprobs, []

    def dies(model, answers):
        calls.append(1)
        if len(calls) > 5:
            raise InterruptedError("killed")
        return real(model, answers)

    monkeypatch.setattr(module, "policy_logprobs", dies)
    with pytest.raises(InterruptedError):
        dpo(tiny_lm_directory, tmp_path / "cut", Settings(**given))
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(module, "policy_logprobs", real)
    dpo(tiny_lm_directory, tmp_path / "cut", Settings(**given))
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_after_a_kill_the_reference_is_not_scored_again(tiny_lm_directory, tmp_path, given, monkeypatch):
    given |= dict(steps=3, held_out=2)
    dpo(tiny_lm_directory, tmp_path / "whole", Settings(**given))
    scored: list[int] = []
    whole = module.without_delta("dpo")

    def dies(model, answers):
        scored.append(len(answers.batch.tokens_BL))
        if len(scored) == 3:
            raise InterruptedError("killed")
        return whole(model, answers)

    monkeypatch.setattr(module, "without_delta", lambda name: dies)
    with pytest.raises(InterruptedError):
        dpo(tiny_lm_directory, tmp_path / "cut", Settings(**given))
    kept = tmp_path / "cut.partial" / ".reference.jsonl"
    assert len(kept.read_text().splitlines()) == 4, "two batches of two pairs were scored"
    kept.write_text(kept.read_text() + "[3, -1")  # the kill came in the middle of a line
    dpo(tiny_lm_directory, tmp_path / "cut", Settings(**given))
    assert len(scored) == 4, "only the held-out batch was left to score"
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert not list((tmp_path / "cut").glob(".*")), "the scores were scratch"


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (dict(beta=0.0), SettingsError, "beta"),
        (dict(label_smoothing=0.5), SettingsError, "label_smoothing"),
        (dict(rank=0), SettingsError, "rank"),
        (dict(held_out=6), DataError, "at least one must stay"),
        (dict(max_length=3), DataError, "max_length"),
        (dict(target="q_porj"), NoSuchLinear, "q_proj"),
        (dict(bata=0.2), SettingsError, "beta"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_left(tiny_lm_directory, tmp_path, given, wrong, error, says):
    with pytest.raises(error, match=says):
        dpo(tiny_lm_directory, tmp_path / "out", Settings(**given | wrong))
    assert not (tmp_path / "out").exists()


def test_full_training_of_an_adapter_is_refused(tiny_lm_directory, tmp_path, given):
    dpo(tiny_lm_directory, tmp_path / "adapter", Settings(**given))
    with pytest.raises(TrainingError, match="merge"):
        dpo(tmp_path / "adapter", tmp_path / "out", Settings(**given | dict(full=True)))

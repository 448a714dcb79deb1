"""LoRA: what trains, what is written, what is recorded, and resuming after a kill."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bildung
from bildung.core.errors import DataError, NoSuchLinear, OutputError, SettingsError, TrainingError
from bildung.core.record import read_record
from bildung.core.settings import resolve
from bildung.model.linear import deltas_off, replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import Int8, Nf4
from bildung.model.taps import Attachment
from bildung.model.transformer import Decoder
from bildung.tune.lora import Settings, add_lora, lora


@pytest.fixture
def tuned(tiny_lm_directory, given, tmp_path):
    """An adapter directory and its record."""
    record = lora(tiny_lm_directory, tmp_path / "tuned", Settings(**given, rank=4, alpha=8, seed=1))
    return tmp_path / "tuned", record


def test_at_the_start_nothing_has_changed_and_only_the_factors_train(tiny_lm, logits):
    before = logits(tiny_lm)
    chosen = add_lora(tiny_lm.model, Settings(data="none", rank=3))
    assert torch.equal(logits(tiny_lm), before)
    trained = {name for name, p in tiny_lm.model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.deltas.lora.{factor}" for name in chosen for factor in ("lora_A", "lora_B")}
    assert len(chosen) == 2 * 7
    logits_BLV = tiny_lm.model(torch.tensor([[5, 6, 7]]))
    logits_BLV.sum().backward()
    # dL/dA = B^T (...) is zero while B is; dL/dB is not.
    for linear in chosen.values():
        assert not linear.deltas["lora"].lora_A.grad.any() and linear.deltas["lora"].lora_B.grad.any()


def test_scaling_of_lora_and_rslora(tiny_lm):
    plain, stable = Settings(data="none", rank=4, alpha=6), Settings(data="none", rank=4, alpha=6, rslora=True)
    name = "model.layers.0.self_attn.q_proj"
    assert add_lora(tiny_lm.model, plain)[name].deltas["lora"].scaling == 6 / 4
    assert add_lora(tiny_lm.model, stable)[name].deltas["lora"].scaling == 6 / math.sqrt(4)


def test_targets_by_name_and_pattern(tiny_lm):
    assert len(add_lora(tiny_lm.model, Settings(data="none", target="q_proj"))) == 2
    some = add_lora(tiny_lm.model, Settings(data="none", target=["*.layers.1.*", "v_proj"]))
    assert len(some) == 7 + 1
    with pytest.raises(NoSuchLinear, match="q_proj"):
        add_lora(tiny_lm.model, Settings(data="none", target="q_prj"))


def test_tuning_lowers_the_loss_and_leaves_an_adapter(tuned, tiny_lm_directory, tiny_lm, logits):
    out, _ = tuned
    assert sorted(p.name for p in out.iterdir() if "token" not in p.name) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "metrics.jsonl",
        "record.json",
        "training.html",
    ]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["loss"] < rows[0]["loss"]
    lm = bildung.load(out)
    assert (logits(lm) - logits(tiny_lm)).abs().max() > 0.05
    with deltas_off(lm.model, "default"):
        assert torch.equal(logits(lm), logits(tiny_lm))
    assert bildung.load(tiny_lm_directory).model.linears().keys() == lm.model.linears().keys()


def test_the_record_says_what_was_trained(tuned, given):
    out, record = tuned
    assert record == read_record(out)
    assert record.operation == "tune lora" and record.seed == 1 and record.settings["rank"] == 4
    # rank · (in + out) of q, k, v, o, gate, up and down of two layers
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert record.measured["trainable_parameters"] == 2 * sum(4 * (i + o) for i, o in sizes)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert record.trained_tokens == sum(row["targets"] for row in rows) > 0
    assert record.tokens_seen == sum(row["tokens"] for row in rows) > record.trained_tokens
    assert record.measured["loss_first"] == rows[0]["loss"] and record.measured["loss_last"] == rows[-1]["loss"]
    assert any("1 row not used" in note and "talks.jsonl:7" in note for note in record.notes)
    assert list(record.data) == [given["data"]]


def test_the_trained_tokens_are_printed(tiny_lm_directory, given, tmp_path, capfd):
    record = lora(tiny_lm_directory, tmp_path / "out", Settings(**given))
    printed = capfd.readouterr().err
    assert f"{record.measured['targets_per_epoch']} of them trained" in printed
    assert f"{record.measured['trainable_parameters']:,} trainable parameters" in printed


def test_dropped_rows_are_said_aloud_and_recorded(tiny_lm_directory, given, tmp_path, capfd):
    record = lora(tiny_lm_directory, tmp_path / "out", Settings(**{**given, "max_length": 40}))
    assert record.notes and all(note in capfd.readouterr().err for note in record.notes[:1])


def test_run_again_it_is_up_to_date(tuned, tiny_lm_directory, given):
    out, record = tuned
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert lora(tiny_lm_directory, out, Settings(**given, rank=4, alpha=8, seed=1)) == record
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_packed_and_padded_rows_train_alike_and_seeds_differ(tiny_lm_directory, given, tmp_path):
    def factors(name, **more):
        lora(tiny_lm_directory, tmp_path / name, Settings(**{**given, "steps": 1, "batch_size": 6} | more))
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    padded = factors("padded", pack=False)
    assert factors("again", pack=False) == padded
    assert factors("seed", pack=False, seed=2) != padded
    # One pass over all of the data is the same gradient, however it is laid out in rows.
    packed = factors("packed", pack=True, batch_size=1, micro_steps=len(rows_of(tmp_path / "padded", given)))
    assert len(packed) == len(padded)
    one, other = (bildung.load(tmp_path / name).model for name in ("padded", "packed"))
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=name)


def rows_of(directory, given):
    """The packed rows of the test's data."""
    from bildung.tune.instruction import prepare

    return prepare(bildung.load(directory).tokenizer, Settings(**given)).batch_at.items


def test_bf16_keeps_the_factors_in_float32(tiny_lm_directory, given, tmp_path):
    lora(tiny_lm_directory, tmp_path / "out", Settings(**{**given, "precision": "bf16"}))
    lm = bildung.load(tmp_path / "out")
    delta = lm.model.linears()["model.layers.0.mlp.up_proj"].deltas["default"]
    assert delta.lora_A.dtype == delta.lora_B.dtype == torch.float32
    assert not torch.equal(delta.lora_B, delta.lora_B.bfloat16().float())


@pytest.mark.parametrize("kind", [Int8, Nf4])
def test_over_a_quantized_base(tiny_lm, given, tmp_path, logits, kind):
    """QLoRA: the base stays as it is, bit for bit, and the adapter loads over it."""
    replace_stores(tiny_lm.model, "all", lambda linear: kind.quantize(linear.base.dense()))
    base = bildung.save(tiny_lm, tmp_path / "base")
    record = lora(base, tmp_path / "tuned", Settings(**given))
    assert record.measured["loss_last"] < record.measured["loss_first"]
    lm = bildung.load(tmp_path / "tuned")
    assert isinstance(lm.model.linears()["model.layers.1.mlp.down_proj"].base, kind)
    with deltas_off(lm.model, "default"):
        assert torch.equal(logits(lm), logits(bildung.load(base)))


def test_an_adapter_can_be_tuned_again(tuned, given, tmp_path, logits):
    """The old deltas stay frozen under the new ones; both are saved as one adapter of summed rank."""
    out, _ = tuned
    record = lora(out, tmp_path / "twice", Settings(**given, rank=2))
    lm = bildung.load(tmp_path / "twice")
    delta = lm.model.linears()["model.layers.0.mlp.up_proj"].deltas["default"]
    old = bildung.load(out).model.linears()["model.layers.0.mlp.up_proj"].deltas["default"]
    assert isinstance(delta, LowRank) and delta.rank == 4 + 2
    assert torch.equal(delta.lora_A[:4], old.lora_A)
    assert list(record.companions) == ["base"]
    assert (logits(lm) - logits(bildung.load(out))).abs().max() > 1e-3


def test_held_out_conversations_are_measured_and_not_trained_on(tiny_lm_directory, given, tmp_path):
    settings = Settings(**{**given, "steps": 4}, held_out=2, evaluate_every=2)
    record = lora(tiny_lm_directory, tmp_path / "out", settings)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 2, 4]
    assert record.measured["examples"] == 4
    assert record.measured["held_out_loss_first"] == rows[0]["held_out_loss"]


def test_epochs_decide_the_steps(tiny_lm_directory, given, tmp_path):
    settings = Settings(**{**given, "steps": None, "pack": False}, epochs=2)
    record = lora(tiny_lm_directory, tmp_path / "out", settings)
    assert record.measured["steps"] == 6 and record.measured["epochs"] == 2


@pytest.mark.slow
def test_killed_and_run_again_it_ends_the_same(tiny_lm_directory, given, tmp_path):
    """kill -9 after the checkpoint of step 2; the second run goes on from there, dropout and all."""
    settings = Settings(**{**given, "steps": 5}, dropout=0.2, checkpoint_every=2)
    lora(tiny_lm_directory, tmp_path / "whole", settings)
    script = "import os, signal, sys; from pathlib import Path; from bildung.core.settings import resolve\n"
    script += "from bildung.train.step import Stepper; from bildung.tune.lora import Settings, lora\n"
    script += "import json; take = Stepper.take\n"
    # A thread writes checkpoints: die when that of step 2 is there, not while it is being written.
    script += "import time; there = Path(sys.argv[2] + '.partial', '.checkpoint-00000002')\n"
    script += "def die():\n    while not there.exists(): time.sleep(0.01)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    script += "Stepper.take = lambda s, n, r: die() if n == 3 else take(s, n, r)\n"
    script += "lora(Path(sys.argv[1]), Path(sys.argv[2]), resolve(Settings, json.loads(sys.argv[3])))"
    from bildung.core.settings import as_dict

    command = [sys.executable, "-c", script, str(tiny_lm_directory), str(tmp_path / "killed")]
    killed = subprocess.run(
        [*command, json.dumps(as_dict(settings))], env={**os.environ}, capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / "killed.partial" / ".checkpoint-00000002").exists()
    record = lora(tiny_lm_directory, tmp_path / "killed", settings)
    assert any("interrupted" in note for note in record.notes)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    whole, again = read_record(tmp_path / "whole"), record
    assert (whole.trained_tokens, whole.tokens_seen) == (again.trained_tokens, again.tokens_seen)
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        (dict(rank=0), SettingsError, "rank must be at least 1"),
        (dict(dropout=1.0), SettingsError, "dropout"),
        (dict(epochs=1.0), SettingsError, "give one of them"),
        (dict(evaluate_every=1), SettingsError, "held_out"),
        (dict(held_out=6), DataError, "at least one must stay"),
        (dict(learning_rate=0.0), SettingsError, "above 0"),
        (dict(warmup=2.0), SettingsError, "warmup"),
        (dict(micro_steps=0), SettingsError, "micro_steps = 0 .* at least 1"),
        (dict(steps=None, epochs=math.nan), SettingsError, "epochs = nan"),
        (dict(steps=None, epochs=-1.0), SettingsError, "epochs = -1"),
        (dict(clip=0.0), SettingsError, "clip = 0"),
        (dict(clip=-1.0), SettingsError, "clip = -1"),
        (dict(weight_decay=-0.1), SettingsError, "weight_decay"),
        (dict(checkpoint_every=-1), SettingsError, "checkpoint_every"),
        (dict(seed=10**20), SettingsError, "64 bits"),
        (dict(alpha=0.0), SettingsError, "alpha = 0"),
        (dict(target="attention"), NoSuchLinear, "no weight matrix"),
        (dict(learning_rate=1e30, clip=None), TrainingError, "step 2, .*: the loss is nan"),
        (dict(data="nowhere.jsonl"), DataError, "no data called"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(tiny_lm_directory, given, tmp_path, wrong, error, words):
    with pytest.raises(error, match=words):
        lora(tiny_lm_directory, tmp_path / "out", Settings(**{**given, **wrong}))
    assert not (tmp_path / "out").exists()


def test_a_model_with_attached_modules_is_refused_before_training(tiny_lm_directory, given, tmp_path, monkeypatch):
    """An adapter has no place for them; this was found when the trained adapter was to be saved."""
    lm = bildung.load(tiny_lm_directory)
    bildung.attach(lm.model, "layers.0.mlp.out", Attachment())
    module = importlib.import_module("bildung.tune.lora")
    monkeypatch.setattr(module, "load", lambda *given: lm)
    monkeypatch.setattr(module, "train", lambda *given: pytest.fail("training had begun"))
    with pytest.raises(OutputError, match=r"attached to this model \(layers\.0\.mlp\.out\).*tune full"):
        lora(tiny_lm_directory, tmp_path / "out", Settings(**given))
    assert not (tmp_path / "out").exists()


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(SettingsError, match="rslora"):
        resolve(Settings, {"data": "x", "rs_lora": True})


def test_the_base_is_multiplied_not_copied_per_step(tiny_lm_directory, given, tmp_path, monkeypatch):
    """Frozen matrices are cast to bfloat16 once at load: float32 masters would be cast in every step."""
    seen = set()
    hidden = Decoder.hidden

    def watch(self, *args, **kwargs):
        seen.update(linear.base.weight.dtype for linear in self.linears().values())
        return hidden(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "hidden", watch)
    lora(tiny_lm_directory, tmp_path / "out", Settings(**{**given, "precision": "bf16"}))
    assert seen == {torch.bfloat16}
    assert Path(tmp_path / "out").exists()

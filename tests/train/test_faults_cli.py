"""Bad input and faults as a user meets them: through the command line, with the message that is printed."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bildung.app.cli import run
from bildung.core.errors import BildungError, DataError, OutputError, TrainingError
from bildung.core.record import read_record
from bildung.core.settings import as_dict
from bildung.pretrain.size import Sized as Birth
from bildung.train.checkpoint import all_in
from tests.processes import START, command_line, torchrun

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve short conversations."""
    path = tmp_path / "talks.jsonl"
    asked = [f"What is the capital of country {number}?" for number in range(12)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": f"It is {q[::-1]}"}] for q in asked]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


def lora_words(source: Path, out: Path, data: Path, **given: Any) -> list[str]:
    settings = {"data": data, "rank": 2, "max_length": 64, "batch_size": 2, "precision": "fp32", "steps": 8, **given}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["tune", "lora", str(source), str(out), *flags]


def test_a_loss_that_is_no_number_names_step_and_batch_and_keeps_the_checkpoint(
    tiny_lm_directory: Path, tmp_path: Path, data: Path
) -> None:
    out = tmp_path / "out"
    words = lora_words(
        tiny_lm_directory, out, data, learning_rate="1e20", schedule="constant", warmup=0, checkpoint_every=1
    )
    with pytest.raises(TrainingError, match=r"step \d, micro-batch \d: the loss is nan.* Lower learning_rate"):
        run(words)
    assert not out.exists() and all_in(tmp_path / "out.partial")


def test_no_trainable_parameter(tiny_lm_directory: Path, tmp_path: Path, data: Path) -> None:
    with pytest.raises(BildungError, match=r"'\*\.nothing'.*q_proj"):
        run([*lora_words(tiny_lm_directory, tmp_path / "out", data), "--target", "*.nothing"])
    assert not list(tmp_path.glob("out*"))


def test_no_target_in_any_batch(tiny_lm_directory: Path, tmp_path: Path) -> None:
    data = tmp_path / "asked.jsonl"
    talk = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    data.write_text(json.dumps(talk) + "\n")
    with pytest.raises(DataError, match="assistant"):
        run(lora_words(tiny_lm_directory, tmp_path / "out", data))


@pytest.mark.parametrize("corrupt", ["checkpoint", "model"])
def test_corruption_is_named(
    tiny_lm_directory: Path,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    corrupt: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A byte of the newest checkpoint has changed: the one before is used. Of a finished model: it is refused."""
    out = tmp_path / "out"
    words = lora_words(tiny_lm_directory, out, data, checkpoint_every=2, keep_last=2)
    if corrupt == "model":
        run(words)
        weights = out / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
        with pytest.raises(BildungError, match=r"adapter_model\.safetensors"):
            run(["tune", "lora", str(out), str(tmp_path / "next"), "--data", str(data), "--steps", "1"])
        return
    killed_at(6, words, monkeypatch)
    newest = all_in(tmp_path / "out.partial")[-1]
    part = newest / "part-0.safetensors"
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    capsys.readouterr()
    run(words)
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 was damaged" in said and "has sha256" in said
    record = read_record(out)
    assert record is not None and any("damaged" in note for note in record.notes)


def killed_at(step: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until so many steps are made and an error that is nobody's stops it."""
    from bildung.train import step as steps

    take: Callable[..., Any] = steps.Stepper.take

    def stops(self: Any, number: int, rows: Any) -> Any:
        if number == step:
            raise RuntimeError("power cut")
        return take(self, number, rows)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(steps.Stepper, "take", stops)
        run(words)


@pytest.mark.slow
def test_a_run_goes_on_with_other_settings_that_do_not_decide_the_result(
    tiny_lm_directory: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed_at(5, lora_words(tiny_lm_directory, out, data, checkpoint_every=2), monkeypatch)
    kept = all_in(tmp_path / "out.partial")
    run(lora_words(tiny_lm_directory, out, data, checkpoint_every=3, recompute="blocks"))
    run(lora_words(tiny_lm_directory, tmp_path / "undisturbed", data))
    record = read_record(out)
    assert kept and record is not None and "settings.recompute none -> blocks" in record.notes[0], record
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "undisturbed"))
    assert one.read_bytes() == other.read_bytes()


def test_rows_of_a_step_by_size_may_be_split_otherwise_among_other_ranks() -> None:
    def decisive(**given: Any) -> Any:
        return Birth.decisive(as_dict(Birth(data="mini:moby", **given)))

    assert decisive(size=2, batch_size=8, micro_steps=1) == decisive(
        size=2, batch_size=2, micro_steps=4, parallel="ddp"
    )
    assert decisive(size=2, batch_size=8, micro_steps=2) != decisive(size=2, batch_size=8, micro_steps=1)
    assert decisive(batch_size=8, micro_steps=1) != decisive(batch_size=4, micro_steps=2)


@pytest.mark.slow
def test_one_process_goes_on_where_two_met_an_error_and_the_error_is_said_once(
    tiny_lm_directory: Path, tmp_path: Path, data: Path
) -> None:
    """The rate of the last step is too high: two ranks find the loss to be nan in the step after it."""
    out = tmp_path / "out"
    given: dict[str, Any] = {"micro_steps": 2, "batch_size": 1, "checkpoint_every": 1, "keep_last": 9}
    words = lora_words(tiny_lm_directory, out, data, **given, learning_rate="1e20", schedule="constant", warmup=0)
    done = torchrun("-m", "bildung", *words, "--parallel", "zero3")
    assert done.returncode and done.stderr.count("the loss is nan") == 1 and "rank 1: " not in done.stderr, done.stderr
    steps = len(all_in(tmp_path / "out.partial"))
    with pytest.raises(TrainingError, match=rf"step {steps + 1}, micro-batch 0: the loss is nan.* up to step {steps}"):
        run(words)
    assert len(all_in(tmp_path / "out.partial")) == steps


def test_a_disk_that_fills(
    tiny_lm_directory: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one where the system lets us make one (root on Linux), else a write that fails as on a full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    try:
        if mounted.returncode:
            monkeypatch.setattr("bildung.train.parts.save_file", full)
        words = lora_words(tiny_lm_directory, disk / "out", data, checkpoint_every=1, keep_last=50, rank=16)
        with pytest.raises(OutputError, match="the disk is full"):
            run(words)
        assert not (disk / "out").exists()
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", str(disk)], check=True)


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tiny_lm_directory: Path, tmp_path: Path, data: Path) -> None:
    """A real SIGINT to a real process; run again, it ends as an undisturbed run does."""
    words = lora_words(tiny_lm_directory, tmp_path / "out", data, steps=100, checkpoint_every=90, dropout=0.1)
    process = START.Process(target=command_line, args=(words, tmp_path / "said"))
    process.start()
    log = tmp_path / "out.partial/metrics.jsonl"
    while process.is_alive() and (not log.exists() or log.read_text().count("\n") < 5):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 130 and "Traceback" not in said, said
    assert "stopping after this step" in said and "is in a checkpoint. To go on: bildung tune lora" in said, said
    assert len(all_in(tmp_path / "out.partial")) == 1 and not (tmp_path / "out").exists()
    run(words)
    run(lora_words(tiny_lm_directory, tmp_path / "undisturbed", data, steps=100, checkpoint_every=90, dropout=0.1))
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "undisturbed"))
    assert one.read_bytes() == other.read_bytes()


LIMITED = """
import resource, sys, psutil, torch
torch.set_num_threads(1)
from bildung.app.cli import main
import bildung.tune.full, bildung.train.plan
own = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (own + 500_000_000, own + 500_000_000))
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits memory on Linux")
def test_a_batch_that_does_not_fit(tiny_lm_directory: Path, tmp_path: Path, data: Path) -> None:
    """A real one: a process with half a gigabyte left reads 4096 rows at a time."""
    assert resource.RLIMIT_AS
    words = ["tune", "full", str(tiny_lm_directory), str(tmp_path / "out"), "--data", "mini:chat", "--steps", "2"]
    words += ["--batch-size", "4096", "--max-length", "128", "--no-pack"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    said = " ".join(done.stderr.split())
    assert "step 1, micro-batch 0: a batch of 4096 rows of 128 tokens does not fit into" in said, said[-2000:]
    assert "the largest part is activations" in said and "is the same training in about" in said, said[-2000:]
    assert torch.OutOfMemoryError  # the GPU's is tested in test_step.py

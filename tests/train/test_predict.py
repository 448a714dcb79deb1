"""What a run will take is said before it starts, kept beside what it took, and right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bildung.app.log import Command, command
from bildung.core import hardware
from bildung.core.operation import Job
from bildung.core.record import read_record
from bildung.data.batches import Example, Shuffled, pad
from bildung.data.streams import Window
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.train import memory, predict
from bildung.train.carry import Carry
from bildung.train.loss import LossSum
from bildung.train.objectives import clm
from bildung.train.training import Training
from bildung.tune.lora import Settings, lora
from tests.train.parallel_run import KEYS

pytestmark = pytest.mark.predicts


def rows(lengths: list[int]) -> list[Example]:
    return [Example([1] * length, [False] + [True] * (length - 1)) for length in lengths]


def test_it_stands_in_the_record_and_in_the_log(
    tiny_lm_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora(tiny_lm_directory, tmp_path / "out", Settings(data="mini:chat", limit=6, steps=2, max_length=48))
    assert "predicted peak memory" in capsys.readouterr().err
    record = read_record(tmp_path / "out")
    assert record is not None
    measured = record.measured
    assert measured["predicted_peak_bytes"] >= sum(measured["predicted_parts"].values()) > 0
    # Two samplings of the same process: the kernel's counters lag by some pages.
    assert record.peak_bytes >= 0.99 * measured["training_peak_bytes"] > 0
    command(Command(directory=tmp_path / "out"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "predicted" in shown and "predicted_parts" not in shown


def job(tmp_path: Path) -> Job:
    return Job("tune", None, tmp_path, None)


def test_the_largest_batch_is_planned(tmp_path: Path) -> None:
    model = build(from_dict(KEYS))
    parts = []
    for lengths in ([8] * 16, [8] * 15 + [60]):
        batch_at = Shuffled(rows(lengths), 2, 0, lambda some: pad(list(some), 0))
        made = job(tmp_path)
        predict.predict(made, model, Training(batch_size=2), batch_at, clm, steps=8)
        parts.append(made.measured["predicted_parts"]["activations"])
        batch, varied = predict.largest(batch_at, 8)
        assert predict.planned(model, Training(), clm, batch, 8, varied).varied == varied == (60 in lengths)
    assert parts[1] > 3 * parts[0]


def test_a_state_that_is_carried_is_left_alone(tmp_path: Path) -> None:
    model = build(from_dict({"model_type": "rnn", "hidden_size": 8, "vocab_size": 20}))
    objective = Carry()
    objective.carried["0.0"] = torch.zeros(2, 8)
    window = Window(torch.ones(2, 6, dtype=torch.long), first=True)
    predict.predict(job(tmp_path), model, Training(), lambda _: window, objective, 2, objective.carried)
    assert list(objective.carried) == ["0.0"] and type(objective.carried["0.0"]) is torch.Tensor


def test_a_loss_that_looks_at_numbers_is_not_predicted(tmp_path: Path) -> None:
    model = build(from_dict(KEYS))

    def objective(model: Any, batch: Any) -> LossSum:
        loss = clm(model, batch)
        return loss if float(loss.total.detach()) > 0 else clm(model, batch)

    made = job(tmp_path)
    batch = pad(rows([5, 5]), 0)
    predict.predict(made, model, Training(), lambda _: batch, objective, 2)
    assert "predicted_peak_bytes" not in made.measured and "not predicted" in made.notes[0]


def test_too_much_is_said_before_it_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict, "room_of", lambda device: 10**6)
    batch = pad(rows([5, 5]), 0)
    predict.predict(job(tmp_path), build(from_dict(KEYS)), Training(), lambda _: batch, clm, 2)
    assert "more than the 1.0 MB there are" in capsys.readouterr().err


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path / "memory.max")
    whole = memory.room_of(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.room_of(torch.device("cpu")) == whole
    (tmp_path / "memory.max").write_text("123456789\n")
    assert memory.room_of(torch.device("cpu")) == 123456789


RUN = """
import json, sys
from pathlib import Path
import torch
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel, load, save
from bildung.tune.full import Settings, full
torch.set_num_threads(1)
source, out, precision = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
given = Settings(data="mini:chat", max_length=256, batch_size=4, steps=3, checkpoint_every=0, precision=precision)
record = full(source, out, given)
print(json.dumps([record.measured["predicted_peak_bytes"], record.peak_bytes, record.measured["predicted_parts"]]))
"""


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_within_ten_percent_of_what_a_real_process_takes(tiny_lm: Any, tmp_path: Path, precision: str) -> None:
    """A model large enough that what is predicted is more than the process was already: 8 million parameters."""
    from bildung.model.store import LanguageModel, save

    keys = {**tiny_lm.config.raw, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "head_dim": 64}
    config = from_dict(keys)
    save(LanguageModel(build(config, seed=0), tiny_lm.tokenizer, config), tmp_path / "source")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(tmp_path / "source"), str(tmp_path / "out"), precision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    predicted, measured, parts = json.loads(done.stdout.splitlines()[-1])
    assert sum(parts.values()) - parts["runtime"] > 1.5e8, parts
    assert abs(predicted / measured - 1) < 0.1, (predicted, measured, parts)

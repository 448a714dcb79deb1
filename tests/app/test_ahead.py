"""What a recipe's steps will take is asked before they run, and stands in their records beside what they took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bildung.app import ahead
from bildung.app.live import live
from bildung.app.planning.asked import answer
from bildung.app.planning.passes import FORWARD
from bildung.core.foretold import Foretold, foretelling
from bildung.core.operation import Job, perform
from bildung.core.recipe import Step, read_recipe
from bildung.core.record import Record, read_record
from bildung.core.settings import settings as settings_class


@settings_class
class Settings:
    pass


def made(out: Path, outer: Path | None = None, **measured: int) -> Record:
    """An operation that measures this, and performs another one first if told where."""

    def work(job: Job) -> None:
        if outer is not None:
            made(outer)
        job.measured = dict(measured)
        (job.out / "file").write_text("x")

    return perform("toy", None, out, Settings(), work)


def test_what_is_foretold_stands_in_the_record_of_that_operation_alone(tmp_path: Path) -> None:
    asked = []

    def teller(source: Path | None) -> Foretold:
        asked.append(source)
        return Foretold({"predicted_peak_bytes": 7, "size": 1}, ("a note",))

    with foretelling(teller):
        record = made(tmp_path / "a", tmp_path / "b", size=2)
    assert record.measured == {"predicted_peak_bytes": 7, "size": 2} and record.notes == ["a note"]  # its own word wins
    within = read_record(tmp_path / "b")
    assert within is not None and within.measured == {} and asked == [None]
    with foretelling(teller):
        assert made(tmp_path / "a", tmp_path / "b", size=2) == record and asked == [None]  # up to date: nobody asks


REPEATS = "{as: text, do: data repeats, from: mini:moby, with: {words: 9, length: 8, shortest: 2, longest: 3, rows: 9}}"


@pytest.fixture
def recipe(tmp_path: Path, tiny_lm_directory: Path) -> Path:
    """Adopts a model, makes a text, and looks at the model."""
    lines = [
        f"{{as: base, do: adopt, from: {tiny_lm_directory}}}",
        REPEATS,
        "{as: atlas, do: look heads, from: base, with: {stretch: 8, rows: 2}}",
        "{as: again, do: look heads, from: base, with: {stretch: 8, rows: 4}}",
    ]
    path = tmp_path / "life.yaml"
    path.write_text(f"out: {tmp_path}/life\nlife:\n" + "".join(f"  - {line}\n" for line in lines))
    return path


@pytest.mark.predicts
def test_every_step_says_what_it_will_take(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planned in this process; what kernels take is counted until they have run."""

    def answered(self: ahead.Ahead, step: Step, source: Path | None) -> dict[str, Any]:
        return answer(json.loads(ahead.request(step, source)))

    monkeypatch.setattr(ahead.Ahead, "_answer", answered)
    monkeypatch.setattr(ahead, "memory_there_is", lambda: 10**6)
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**9)))
    records = live(read_recipe(recipe))
    parts = {name: record.measured["predicted_parts"] for name, record in records.items()}
    for name, record in records.items():
        assert record.measured["predicted_peak_bytes"] == sum(parts[name].values()) >= 10**9
    assert parts["base"]["weights"] == parts["atlas"]["weights"] > 10**5 and "activations" not in parts["base"]
    assert 10**5 < parts["text"]["different words"] < 10**7
    assert parts["text"]["runtime"] == 10**9 < parts["atlas"]["runtime"] == 10**9 + FORWARD
    assert parts["again"]["runtime"] == 10**9  # they have run by then
    said = capsys.readouterr()
    assert said.err.count("predicted peak memory 1.0") == said.err.count("more than the 1.0 MB there are") == 4
    assert "predicted  peak memory" in said.out


@pytest.mark.slow
def test_within_ten_percent_of_what_a_life_takes(recipe: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "bildung", "live", recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for step in read_recipe(recipe).steps:
        record = read_record(step.out)
        assert record is not None
        predicted, parts = (record.measured[f"predicted_{what}"] for what in ("peak_bytes", "parts"))
        assert abs(predicted / record.peak_bytes - 1) < 0.1, (step.name, parts, record.peak_bytes)


@pytest.mark.predicts
@pytest.mark.parametrize(
    "planner, why",
    [
        ('print(\'{"why": "it is too odd"}\')', "it is too odd"),
        ("raise ValueError('a fault')", "planning ended with ValueError: a fault"),
        ("import time; time.sleep(60)", "planning ended with exit code -9"),
    ],
)
def test_what_cannot_be_planned_is_a_note(
    planner: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "PLANNER", ("-c", planner))
    monkeypatch.setattr(ahead, "LONGEST", 0.2 if "sleep" in planner else 60.0)
    (tmp_path / "life.yaml").write_text(f"out: {tmp_path}/life\nlife: [{REPEATS}]")
    record = live(read_recipe(tmp_path / "life.yaml"))["text"]
    assert record.notes == [f"memory was not predicted: {why}"] and "predicted_peak_bytes" not in record.measured

"""bildung evaluate: printing, keeping, and being up to date."""

from __future__ import annotations

import json

import pytest

from bildung.app.cli import run
from bildung.core.record import read_record
from bildung.evaluate.card import CardSettings
from bildung.evaluate.evaluate import Settings, evaluate

FLAGS = ["--tasks", "elements", "--limit", "4", "--dtype", "float32", "--sample-tokens", "3"]
SMALL = Settings(card=CardSettings(tasks=("elements",), limit=4, dtype="float32", sample_tokens=3))


def test_the_operation_leaves_card_and_record(tiny_lm_directory, tmp_path):
    record = evaluate(tiny_lm_directory, tmp_path / "card", SMALL)
    kept = json.loads((tmp_path / "card" / "card.json").read_text())
    assert kept == record.after == read_record(tmp_path / "card").after
    assert kept["tasks"]["elements"]["n"] == 4
    assert set(record.data) == {
        "elements.yaml",
        str(next(key for key in record.data if key.endswith("elements.jsonl"))),
    }
    written = (tmp_path / "card" / "record.json").stat().st_mtime_ns
    evaluate(tiny_lm_directory, tmp_path / "card", SMALL)
    assert (tmp_path / "card" / "record.json").stat().st_mtime_ns == written


def test_the_command_prints_every_number(tiny_lm_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(["evaluate", str(tiny_lm_directory), *FLAGS])
    printed = capsys.readouterr().out
    assert "elements" in printed and "acc" in printed and "±" in printed and "What is the capital of France?" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_command_keeps_the_card_when_out_is_given(tiny_lm_directory, tmp_path, capsys):
    run(["evaluate", str(tiny_lm_directory), str(tmp_path / "card"), *FLAGS])
    assert (tmp_path / "card" / "card.json").is_file() and "elements" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["reviews"])
def test_what_was_not_measured_is_printed(tiny_lm_directory, tmp_path, capsys, monkeypatch, task):
    monkeypatch.setenv("BILDUNG_NURSERY", str(tmp_path / "none"))
    run(["evaluate", str(tiny_lm_directory), "--tasks", "elements", task, *FLAGS[2:]])
    assert "not measured: reviews: nursery:imdb was not fetched" in capsys.readouterr().out

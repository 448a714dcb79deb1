"""The biography and the comparison of two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bildung.app import compare, log
from bildung.app.cli import run
from bildung.core.errors import RecordError


@pytest.fixture
def lives(toys, monkeypatch, capsys):
    """base -> tall -> taller, and base -> oak."""
    monkeypatch.setenv("COLUMNS", "160")
    run(["toy", "grow", "pypi:toy==1", "base"])
    run(["toy", "grow", "base", "tall", "--lines", "3"])
    run(["toy", "grow", "tall", "taller", "--lines", "1", "--word", "oak"])
    run(["toy", "grow", "base", "oak", "--word", "oak"])
    capsys.readouterr()
    return capsys


def test_the_biography_tells_every_operation_with_before_and_after(lives):
    shutil.rmtree("base")  # the youth may be gone
    run(["log", "taller"])
    out = lives.readouterr().out
    assert out.index("1. toy grow") < out.index("2. toy grow") < out.index("3. toy grow")
    assert "lines 3" in out and "word oak" in out and "from ../tall" in out and "pypi:toy==1" in out
    assert "7 of 20 tokens trained" in out and "measured: size.lines 7" in out
    [born, tall, taller] = [line[line.index("height") :].split() for line in out.splitlines() if "height" in line]
    assert born == ["height", "acc", "-", "0.3"]
    assert tall == ["height", "acc", "0.3", "0.6", "+0.3", "±", "0.12"]
    assert taller == ["height", "acc", "0.6", "0.7", "+0.1", "±", "0.12"]


def test_the_whole_record_for_programs(lives):
    run(["log", "tall", "--json"])
    record = json.loads(lives.readouterr().out)
    assert record == json.loads(Path("tall/record.json").read_text())


def test_a_model_without_record(lives, tmp_path):
    with pytest.raises(RecordError, match="bildung adopt"):
        log.record_of(tmp_path)


def test_comparing_tells_what_was_made_differently_and_what_it_changed(lives):
    run(["compare", "taller", "oak"])
    out = lives.readouterr().out
    assert "settings.lines 1 -> 2" in out and "settings.word" not in out
    assert "only A: toy grow" in out and "only B" not in out
    assert next(line for line in out.splitlines() if "height" in line).split() == [
        "height", "acc", "0.7", "0.5", "-0.2", "±", "0.13",
    ]  # fmt: skip


def test_comparing_a_model_with_itself(lives):
    run(["compare", "oak", "oak"])
    assert lives.readouterr().out.count("the same") == 2


def test_cards_of_other_items_are_not_paired(lives):
    path = Path("oak/record.json")
    path.write_text(
        path.read_text().replace('"fingerprint": "f"', '"fingerprint": "g"').replace('"docs": "d"', '"docs": "e"')
    )
    run(["compare", "tall", "oak"])
    out = lives.readouterr().out
    assert "not measured in the same way" in out and "±" not in out


def test_models_that_were_never_evaluated(lives):
    path = Path("oak/record.json")
    record = json.loads(path.read_text()) | {"before": {}, "after": {}}
    path.write_text(json.dumps(record))
    run(["compare", "tall", "oak"])
    assert "oak was not evaluated; `bildung evaluate" in lives.readouterr().out
    assert compare.made_differently(log.record_of(Path("oak")), log.record_of(Path("oak"))) == []

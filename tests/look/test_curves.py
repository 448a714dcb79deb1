"""Curves of runs: what is read from their logs, and a picture that can be looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bildung.core.errors import DataError
from bildung.look.curves import Settings, curves


def run_at(place: Path, held: list[float]) -> Path:
    """A directory with a log: two steps between measurements, of losses 1 above and 1 below 4, 3, 2..."""
    place.mkdir()
    rows = [{"step": 0, "held_out_loss": held[0]}]
    for number, loss in enumerate(held[1:]):
        rows.append({"step": 2 * number + 1, "loss": 5.0 - number})
        rows.append({"step": 2 * number + 2, "loss": 3.0 - number, "held_out_loss": loss})
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_the_curves_the_best_and_the_sentence(tmp_path: Path) -> None:
    none, other = run_at(tmp_path / "none", [6, 5, 5.1, 5.2, 5.3]), run_at(tmp_path / "other", [6, 5, 4.5, 4.25, 4.0])
    record = curves(none, tmp_path / "out", Settings(runs=(other,), title="both"))
    assert record.measured["none"] == {
        "training_loss": 1.0,
        "held_out_loss": 5.3,
        "held_out_loss_best": 5,
        "best_step": 2,
    }
    assert [note.startswith("none: overfitting since about step 2") for note in record.notes] == [True]
    found = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert found[1]["trained"] == [[2, 4.0], [4, 3.0], [6, 2.0], [8, 1.0]]
    assert found[1]["held_out"][-1] == [8, 4.0] and found[1]["overfitting"] is None
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_directory_without_a_log_and_a_log_without_held_out_losses_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        curves(tmp_path / "empty", tmp_path / "out", Settings())
    with pytest.raises(DataError, match="evaluate_every"):
        curves(run_at(tmp_path / "short", [6]), tmp_path / "out", Settings())

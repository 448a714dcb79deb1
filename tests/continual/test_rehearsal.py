"""Rehearsal: the share of the final mix, which rows are kept, rows that the model writes itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bildung.continual.rehearsal import (
    MEMORY,
    WRITTEN,
    RehearsalSettings,
    balanced,
    drawn,
    read_memory,
    replay_count,
    reservoir,
    user_opening,
    write_conversations,
)
from bildung.continual.train import Settings, train
from bildung.core.errors import DataError, ModelFileError, SettingsError
from bildung.core.record import read_record
from bildung.core.settings import resolve
from bildung.model.store import LanguageModel


def rows(task: str, count: int, classes: int = 1) -> list[dict[str, Any]]:
    return [{"task": task, "text": f"{task} {n}", "label": f"{task}/{n % classes}"} for n in range(count)]


def test_the_ratio_is_a_share_of_the_final_mix() -> None:
    assert replay_count(1000, 0.1) == 111 and replay_count(300, 0.5) == 300 and replay_count(1000, 0.3) == 429
    assert abs(111 / 1111 - 0.1) < 1e-3 and 100 / 1100 < 0.092  # a tenth of the new ones is not enough


def test_a_small_memory_is_gone_through_before_anything_comes_again() -> None:
    kept = rows("a", 10)
    found = Counter(row["text"] for row in drawn(kept, 25, seed=0))
    assert len(found) == 10 and set(found.values()) == {2, 3} and drawn(kept, 25, 0) != drawn(kept, 25, 1)
    with pytest.raises(DataError, match="memory of earlier tasks is empty"):
        drawn([], 3, 0)


def test_a_reservoir_keeps_every_row_with_the_same_chance() -> None:
    """Three tasks of 20, 20 and 60 rows, one after the other: places in proportion, early rows as likely as late."""
    counts: Counter[str] = Counter()
    runs = 400
    for run in range(runs):
        kept: list[Any] = []
        seen = 0
        for name, size in (("a", 20), ("b", 20), ("c", 60)):
            kept = reservoir(kept, seen, rows(name, size), 10, f"{run} {name}")
            seen += size
        assert len(kept) == 10
        counts.update(row["text"] for row in kept)
    by_task = Counter({name: sum(n for text, n in counts.items() if text[0] == name) for name in "abc"})
    for name, expected in (("a", 2), ("b", 2), ("c", 6)):
        assert by_task[name] / runs == pytest.approx(expected, rel=0.15)
    assert counts["a 0"] / runs == pytest.approx(0.1, abs=0.05)


def test_a_balanced_memory_gives_tasks_and_their_classes_equal_places() -> None:
    everything = [*rows("a", 200, classes=2), *rows("b", 30, classes=3), *rows("c", 5)]
    kept = balanced(everything, 36, "seed")
    assert Counter(row["task"] for row in kept) == {"a": 16, "b": 15, "c": 5}  # c has no more; the others share
    assert Counter(row["label"] for row in kept if row["task"] == "a") == {"a/0": 8, "a/1": 8}
    assert Counter(row["label"] for row in kept if row["task"] == "b") == {"b/0": 5, "b/1": 5, "b/2": 5}


def test_a_sequence_rehearses_what_it_kept(
    encoder: Path, tasks: Any, given: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = given(tasks=tasks, method="rehearsal", steps=2, rehearsal={"share": 0.25, "memory": 12})
    train(encoder, tmp_path / "out", settings)
    second = read_record(tmp_path / "out" / "2-times")
    assert second is not None
    assert second.measured["rehearsed_rows"] == 20 and second.measured["rehearsed_share"] == pytest.approx(0.25)
    kept, seen = read_memory(tmp_path / "out" / "2-times")
    assert seen == 120 and Counter(row["task"] for row in kept) == {"pets": 6, "times": 6}
    assert Counter(row["label"] for row in kept)["pets/cat"] == 3
    (tmp_path / MEMORY).write_text("{}")
    with pytest.raises(ModelFileError, match="does not hold the rows of earlier tasks"):
        read_memory(tmp_path)


@pytest.mark.slow
def test_old_rows_keep_the_old_task(encoder: Path, given: Callable[..., Settings], tmp_path: Path) -> None:
    """Between all classes, plain training forgets the first task whole; rehearsal does not."""
    rehearsal = {"share": 0.5, "memory": 60}
    settings = given(heads="shared", steps=60, method="rehearsal", rehearsal=rehearsal)
    scores = train(encoder, tmp_path / "out", settings).measured["scores"][1]
    assert scores["pets"]["score"] > 0.8 and scores["times"]["score"] > 0.8


def test_the_model_writes_its_own_rows(tiny_lm: LanguageModel) -> None:
    settings = RehearsalSettings(new_tokens=6, generate=True)
    opening = tiny_lm.tokenizer.decode(user_opening(tiny_lm.tokenizer))
    assert opening == "<|im_start|>user\n"
    made = write_conversations(tiny_lm, 5, settings, seed=1)
    assert len(made) == 5 and made == write_conversations(tiny_lm, 5, settings, seed=1)
    assert made != write_conversations(tiny_lm, 5, settings, seed=2)
    for row in made:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert all(turn["content"] for turn in row["messages"])
    tiny_lm.tokenizer.chat_template = None
    with pytest.raises(SettingsError, match="has no chat template"):
        write_conversations(tiny_lm, 1, settings, seed=1)


def test_generative_replay_in_a_sequence(tiny_lm_directory: Path, tmp_path: Path) -> None:
    files = []
    for name in ("sea", "sky"):
        path = tmp_path / f"{name}.jsonl"
        turns = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": f"The {name} is blue."}]
        path.write_text("\n".join([json.dumps({"messages": turns})] * 8))
        files.append(f"{name}={path}")
    given = {"tasks": files, "held_out": 2, "steps": 2, "precision": "fp32", "method": "rehearsal"}
    settings = resolve(Settings, {**given, "rehearsal": {"generate": True, "share": 0.4, "new_tokens": 8}})
    train(tiny_lm_directory, tmp_path / "out", settings)
    written = json.loads((tmp_path / "out" / "2-sky" / WRITTEN).read_text())
    record = read_record(tmp_path / "out" / "2-sky")
    assert len(written) == 4 and record is not None and record.measured["rehearsed_rows"] == 4
    assert not (tmp_path / "out" / "1-sea" / WRITTEN).exists() and not (tmp_path / "out" / "1-sea" / MEMORY).exists()

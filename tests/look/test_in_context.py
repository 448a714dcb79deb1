"""`bildung look in_context`: what is shown, how it is counted, and what calibration does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import bildung
from bildung.core.errors import DataError, SettingsError
from bildung.evaluate import task_file
from bildung.look import in_context as module
from bildung.look.in_context import Settings, demonstrations, in_context, read
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}} is"
doc_to_choice: [red, blue]
doc_to_target: label
metric_list: [{metric: acc}]
metadata: {version: 1}
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    rows = [{"text": f"thing {number}", "label": number % 2} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "colours.yaml").write_text(TASK, encoding="utf-8")
    return str(tmp_path / "colours.yaml")


@pytest.fixture
def source(tiny_lm: LanguageModel, tmp_path: Path) -> Path:
    return bildung.save(tiny_lm, tmp_path / "source")


def given(task: str, **more: Any) -> Settings:
    return Settings(**{"task": task, "shots": (0, 1, 3), "rounds": 2, "questions": 6, "dtype": "float32"} | more)


def test_a_curve_with_its_errors_and_a_picture(
    source: Path, task: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    drawn: list[Any] = []
    draw_lines = module.draw_lines
    monkeypatch.setattr(module, "draw_lines", lambda panels, path: (drawn.extend(panels), draw_lines(panels, path)))
    record = in_context(source, tmp_path / "out", given(task, orders=2))
    points = record.measured["points"]
    assert [p["shots"] for p in points] == [0, 1, 3] and record.measured["questions"] == 6
    assert all(0 <= p["least"] <= p["accuracy"] <= p["most"] <= 1 for p in points)
    assert points[0]["spread"] == 0 and all(p["calibrated"] is not None for p in points)
    assert (tmp_path / "out" / "in_context.png").stat().st_size > 5000
    (panel,) = drawn
    assert list(panel.x_names.values()) == ["0", "1", "3"] and panel.x_names.keys() == {0.0, 1.0, 2.0}
    assert panel.errors["as it answers"] == [p["stderr"] for p in points] and len(panel.errors) == 2
    assert "  3 examples:" in capsys.readouterr().out


def test_as_many_questions_of_each_class_are_asked(source: Path, task: str, tmp_path: Path, capsys: Any) -> None:
    rows = [{"text": f"thing {number}", "label": int(number % 8 == 0)} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    record = in_context(source, tmp_path / "out", given(task, shots=(0,), questions=8, calibrate=False))
    assert record.measured["questions_by_answer"] == {"red": 4, "blue": 4} and record.measured["most_frequent"] == 0.5
    assert "8 questions, 4 of 'red', 4 of 'blue'" in capsys.readouterr().out
    assert [row["label"] for row in read(given(task, questions=12))[1]].count(1) == 5
    for wrong, words in (
        ({"shots": (4, -1)}, "shots = 4 -1 was given; .* each at least 0"),
        ({"rounds": 0}, "rounds = 0"),
    ):
        with pytest.raises(SettingsError, match=words):
            in_context(source, tmp_path / "no", given(task, **wrong))


def test_the_examples_are_no_questions_and_more_begin_with_fewer(task: str) -> None:
    _, asked, pool, _ = read(given(task))
    assert len(asked) == 6 and len(pool) == 6 and not any(row in pool for row in asked)
    settings = given(task, orders=3)
    three, one = list(demonstrations(pool, 3, settings)), list(demonstrations(pool, 1, settings))
    assert len(three) == 6 and len(one) == 2
    assert [rows[:1] for rows, _ in three[::3]] == [rows for rows, _ in one]
    assert sorted(map(str, three[0][0])) == sorted(map(str, three[1][0])) == sorted(map(str, three[2][0]))
    assert len(list(demonstrations(pool, 0, settings))) == 1


def test_the_labels_of_the_examples(task: str) -> None:
    file, _, pool, _ = read(given(task))
    right = [module._shown(file, [row], given(task), 0)[0] for row in pool]
    assert right == [f"{row['text']} is {['red', 'blue'][row['label']]}\n\n" for row in pool]
    other = [module._shown(file, [row], given(task, labels="exchanged"), 0)[0] for row in pool]
    assert other == [f"{row['text']} is {['blue', 'red'][row['label']]}\n\n" for row in pool]
    drawn = {module._shown(file, pool, given(task, labels="random"), number)[0] for number in range(8)}
    assert len(drawn) == 2


def test_calibration_takes_a_preference_away(source: Path, task: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A model that always prefers the second answer by 2 nats, and knows the right one by 1."""

    def scores(lm: Any, file: Any, beginning: Any, asked: Any) -> Any:
        knows = [row["label"] if row["text"] not in module.CONTENT_FREE else None for row in asked]
        return [[float(one == 0), 2.0 + float(one == 1)] for one in knows], 0.0

    monkeypatch.setattr(module, "answer_logprobs", scores)
    record = in_context(source, tmp_path / "out", given(task, shots=(0,)))
    _, asked, _, _ = read(given(task))
    point = record.measured["points"][0]
    assert point["accuracy"] == sum(row["label"] for row in asked) / 6 and point["calibrated"] == 1.0


def test_examples_that_do_not_fit_are_left_out_whole_and_counted(
    source: Path, task: str, tmp_path: Path, tiny_lm: LanguageModel
) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"max_position_embeddings": 40}
    short = from_dict(config)
    narrow = bildung.save(LanguageModel(build(short, 0), tiny_lm.tokenizer, short), tmp_path / "narrow")
    record = in_context(narrow, tmp_path / "out", given(task, shots=(6,), rounds=1))
    left = record.measured["points"][0]["left_out"]
    assert 1 <= left <= 5 and any("did not fit" in note for note in record.notes)


def test_bad_input(source: Path, task: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="6 rows are left"):
        in_context(source, tmp_path / "out", given(task, shots=(7,)))
    with pytest.raises(SettingsError, match="at least 1"):
        in_context(source, tmp_path / "out", given(task, rounds=0))
    with pytest.raises(DataError, match="output_type loglikelihood_rolling"):
        in_context(source, tmp_path / "out", given("prose"))
    assert task_file.find_task_file(task)

"""`tune by_examples`: both ways learn from the same texts; a broken run goes on; the errors are what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import bildung
from bildung.core.errors import DataError, SettingsError
from bildung.core.settings import resolve
from bildung.data.labelled import Labelled
from bildung.look.pages.by_examples_page import mean_and_error
from bildung.tune.by_examples import RUNS, Settings, by_examples, drawn, planned

RECIPE = Path(bildung.__file__).parent.parent / "recipes" / "generative_discriminative.yaml"


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [{"text": word * 3, "label": number % 2} for number, word in enumerate(["sun ", "fog "] * 20)]
    path = tmp_path / "weather.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def given(data: str, **more: Any) -> Settings:
    usual = dict(words=("good", "bad"), template="{text}is", sizes=(4, 8), rounds=2, drawn_once=8, test_limit=12)
    small = dict(least_steps=10, batch_size=4, learning_rate=2e-2, precision="fp32", max_length=24)
    return resolve(Settings, {"data": data, "test": data, **usual, **small, **more})


def test_the_curve_and_how_a_broken_run_goes_on(
    data: str, tmp_path: Path, tiny_lm_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module = importlib.import_module("bildung.tune.by_examples")
    settings, out, real, asked = given(data), tmp_path / "out", module.one_run, []

    def counted(job: Any, source: Path, key: Any, *rest: Any) -> Any:
        if len(asked) == 2:
            asked.append("broken off")
            raise KeyboardInterrupt
        asked.append(key)
        return real(job, source, key, *rest)

    monkeypatch.setattr(module, "one_run", counted)
    with pytest.raises(KeyboardInterrupt):
        by_examples(tiny_lm_directory, out, settings)
    record = by_examples(tiny_lm_directory, out, settings)
    asked.remove("broken off")
    assert asked == planned(settings) and len(asked) == 1 + 2 * 2 + 2  # each once, though started twice
    zero, few, more = record.measured["points"]
    assert zero["examples"] == 0 and "discriminative" not in zero
    assert few["examples"] == 4 and len(few["generative_rounds"]) == 2 and len(more["generative_rounds"]) == 1
    assert more["generative"] == 1.0 and more["discriminative"] == 1.0 and more["difference"] == 0
    said = capsys.readouterr()
    assert "7 runs of 60 steps of 4 texts, 12 test texts each" in said.err and "left," in said.err
    assert "generative" in said.out
    files = {path.name for path in out.iterdir()}
    assert files == {"curve.json", "curve.png", "index.html", RUNS, "record.json"}
    page = (out / "index.html").read_text()
    assert "1.000 ± 0.000" in page and "data:image/png" in page


def test_draws_are_of_all_classes_and_begin_alike() -> None:
    data = Labelled([(str(n), None) for n in range(40)], [int(n >= 30) for n in range(40)], ("a", "b"), [])
    small, large = drawn(data, 8, "0"), drawn(data, 30, "0")
    assert large.texts[:8] == small.texts and sum(small.labels) == 4
    assert sum(large.labels) == 10 and len(set(large.texts)) == 30  # one class has no more to give
    assert drawn(data, 8, "1").texts != small.texts


def test_the_error_is_of_texts_and_of_rounds() -> None:
    mean, error = mean_and_error([[1, 0, 1, 1], [0, 0, 1, 0]])
    texts = [0.5, 0.0, 1.0, 0.5]  # mean 0.5, variance 1 / 6; rounds 0.75 and 0.25: variance 1 / 8
    assert mean == sum(texts) / 4 == 0.5 and error == pytest.approx((1 / 6 / 4 + 1 / 8 / 2) ** 0.5)


def test_bad_input(data: str, tmp_path: Path, tiny_lm_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for more, words in (
        (dict(sizes=(1, 8)), "an example of each of the 2 classes"),
        (dict(sizes=(8, 100)), "has 40 texts, and 100"),
        (dict(words=("good", "bad", "so")), "2 classes .*3 words"),
    ):
        with pytest.raises((DataError, SettingsError), match=words):
            by_examples(tiny_lm_directory, tmp_path / "no", given(data, **more))
    monkeypatch.setattr(importlib.import_module("bildung.tune.by_examples"), "one_run", pytest.fail)
    with pytest.raises(SettingsError, match="rank = 99 was given"):  # before the first run, and not after it
        by_examples(tiny_lm_directory, tmp_path / "no", given(data, rank=99))


def test_the_recipe_resolves() -> None:
    (asked,) = (step["with"] for step in yaml.safe_load(RECIPE.read_text())["life"] if step["do"] == "tune by_examples")
    assert max(resolve(Settings, {**asked, "seed": 0}).sizes) == 19_800

"""`bildung tune classify_words`: the probabilities are those of the words, and training moves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.core.errors import DataError, SettingsError
from bildung.data.labelled import read_labelled
from bildung.model.store import LanguageModel
from bildung.tune.classify_words import Settings, classify_words, encode, word_logprobs


@pytest.fixture
def source(tiny_lm: LanguageModel, tmp_path: Path) -> Path:
    return bildung.save(tiny_lm, tmp_path / "source")


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [{"text": word * 3, "label": number % 2} for number, word in enumerate(["sun ", "fog "] * 20)]
    path = tmp_path / "weather.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def given(data: str, **more: Any) -> Settings:
    usual = dict(words=("good", "bad"), steps=12, learning_rate=1e-2, precision="fp32", held_out=8, template="{text}is")
    return Settings(data=data, **usual | more)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_to_write_the_word(source: Path, data: str, tmp_path: Path, method: str, capsys: Any) -> None:
    record = classify_words(source, tmp_path / "out", given(data, method=method))
    assert record.measured["accuracy"] == 1.0 and record.measured["nll"] < record.measured["before"]["nll"] / 2
    assert record.measured["texts"] == 8 and record.measured["trained_texts"] == 32
    assert "called" in capsys.readouterr().out
    lm = bildung.load(tmp_path / "out")
    held = read_labelled(data, limit=6)
    assert word_logprobs(lm, held, given(data)).argmax(-1).tolist() == held.labels
    assert bool(lm.model.linears()["model.layers.0.mlp.up_proj"].deltas) is (method == "lora")


def test_measuring_alone_changes_nothing(source: Path, data: str, tmp_path: Path) -> None:
    record = classify_words(source, tmp_path / "out", given(data, method="none", held_out=0, test=data, test_limit=10))
    assert record.measured["texts"] == 10 and record.measured["before"]["accuracy"] == record.measured["accuracy"]
    before, after = (bildung.load(path).model.state_dict() for path in (source, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_probabilities_are_those_of_the_words(tiny_lm: LanguageModel, data: str) -> None:
    texts = read_labelled(data, limit=2)
    found = word_logprobs(tiny_lm, texts, given(data, words=("good", "not so good")))
    expected = []
    for word in ("good", "not so good"):
        context = tiny_lm.tokenizer.encode("sun sun sun is")
        tokens = tiny_lm.tokenizer.encode(f"sun sun sun is {word}")
        with torch.no_grad():
            logp = tiny_lm.model(torch.tensor([tokens])).log_softmax(-1)[0]
        expected.append(sum(float(logp[at - 1, tokens[at]]) for at in range(len(context), len(tokens))))
    torch.testing.assert_close(found[0], torch.tensor(expected).log_softmax(-1), atol=1e-5, rtol=1e-4)


def test_a_long_text_loses_its_end_and_keeps_the_question(tiny_lm: LanguageModel, data: str) -> None:
    settings = given(data, max_length=24, template="Text: {text}\nLabel:")
    one, other = encode(tiny_lm.tokenizer, "begins and goes on " * 20, settings, [0, 1])
    assert len(one) <= 25 and one.tokens[: -one.num_targets] == other.tokens[: -other.num_targets]
    text = tiny_lm.tokenizer.decode(one.tokens)
    assert "Text: begins" in text and text.endswith("\nLabel: good")


def test_bad_input(source: Path, data: str, tmp_path: Path) -> None:
    for more, words in (
        (dict(words=("good",)), "at least two classes"),
        (dict(words=("good", " good")), "all different"),
        (dict(template="no place"), "hold {text} once"),
        (dict(rank=0), "rank"),
        (dict(max_length=3), "leave no room"),
    ):
        with pytest.raises(SettingsError, match=words):
            classify_words(source, tmp_path / "out", given(data, **more))
    with pytest.raises(DataError, match="has 2 classes"):
        classify_words(source, tmp_path / "out", given(data, words=("a", "b", "c")))

"""BERT from nothing: learned beyond the majority, resumed exactly, opened by transformers; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bildung
from bildung.core.errors import BildungError, DataError, SettingsError
from bildung.core.record import Record
from bildung.core.settings import resolve
from bildung.pretrain.masked import Settings, joined, masked
from tests.model.tiny_encoder import CONFIG, wordpiece


@pytest.fixture
def words(tmp_path: Path) -> Path:
    directory = tmp_path / "words"
    wordpiece().save(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Documents that each speak of one letter, sentence by sentence: what follows is told by the letter."""
    path = tmp_path / "text.jsonl"
    letters = "bcdefghklmnpqrstvwxz"
    rows = [{"text": " ".join(f"The {one} saw {one} {one} {one} {one}." for _ in range(12))} for one in letters * 2]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def given(text: str, **other: Any) -> Settings:
    common = {"data": text, "model": dict(CONFIG), "steps": 80, "max_length": 32, "batch_size": 16, "held_out": 4}
    return resolve(Settings, {**common, "precision": "fp32", "learning_rate": 1e-2, "checkpoint_every": 5, **other})


def test_bert_is_born(words: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = masked(words, tmp_path / "bert", given(text, steps=250))
    measured = record.measured
    assert measured["mlm_accuracy"] > measured["majority_mlm_accuracy"] + 0.3
    assert measured["nsp_accuracy"] > measured["majority_nsp_accuracy"] + 0.1
    assert 0.4 < measured["random_share"] < 0.6 and record.trained_tokens > 0
    said = capsys.readouterr()
    assert f"{measured['random_share']:.3f} of them with label 1" in said.err
    assert f"{measured['majority_mlm_accuracy']:.3f}" in said.out and "always" in said.out
    lm = bildung.load(tmp_path / "bert")
    assert lm.config.heads == ("pooler", "mlm", "nsp") and lm.config.vocab_size == wordpiece().vocab_size
    peer = transformers.BertForPreTraining.from_pretrained(tmp_path / "bert").eval()
    tokens = torch.tensor([[2, 7, 4, 9, 3]])
    with torch.no_grad():
        assert torch.allclose(peer(tokens).prediction_logits, lm.model(tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "heads"),
    [
        ({"objective": "mlm", "pack": True, "whole_words": True}, ("mlm",)),
        ({"objective": "mlm+sop"}, ("pooler", "mlm", "nsp")),
        ({"objective": "mlm", "model": {**CONFIG, "model_type": "roberta"}}, ("mlm",)),
    ],
)
def test_other_objectives(
    words: Path, text: str, tmp_path: Path, change: dict[str, Any], heads: tuple[str, ...]
) -> None:
    record = masked(words, tmp_path / "out", given(text, **change))
    assert record.measured["mlm_accuracy"] > record.measured["majority_mlm_accuracy"]
    assert bildung.load(tmp_path / "out").config.heads == heads
    assert ("nsp_accuracy" in record.measured) == (len(heads) == 3)


def test_rows_that_are_verses(words: Path, text: str, tmp_path: Path) -> None:
    record = masked(words, tmp_path / "out", given(text, document_rows=4, held_out=2, steps=1))
    assert record.measured["documents"] == 8, "40 rows are 10 documents, of which 2 are set aside"
    assert joined(["a", "b", "c"], 2) == ["a b", "c"]


def test_training_goes_on_from_a_model(words: Path, text: str, tmp_path: Path) -> None:
    first = masked(words, tmp_path / "one", given(text, steps=20))
    second = masked(tmp_path / "one", tmp_path / "two", given(text, model=None))
    assert second.measured["mlm_perplexity"] < first.measured["mlm_perplexity"]


def test_killed_and_run_again_is_the_same_model(
    words: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bildung.train import training

    masked(words, tmp_path / "whole", given(text, steps=20))
    real = training.fit

    def killed(*arguments: Any, **named: Any) -> None:
        real(*arguments, **{**named, "steps": 12})
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        masked(words, tmp_path / "again", given(text, steps=20))
    monkeypatch.undo()
    masked(words, tmp_path / "again", given(text, steps=20))
    one, two = (bildung.load(tmp_path / name).model.state_dict() for name in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def refused(words: Path, text: str, out: Path, change: dict[str, Any], error: type[BildungError], says: str) -> None:
    def attempt() -> Record:
        return masked(words, out, given(text, **change))

    with pytest.raises(error, match=says):
        attempt()
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"share": 0.0}, SettingsError, "share = 0.0"),
        ({"share": 1.5}, SettingsError, "share = 1.5"),
        ({"document_rows": 0}, SettingsError, "document_rows = 0"),
        ({"copies": 0}, SettingsError, "copies = 0"),
        ({"held_out": 1}, SettingsError, "held_out = 1"),
        ({"pack": True}, SettingsError, "pack is for mlm alone"),
        ({"max_length": 65}, SettingsError, "context has 64 tokens"),
        ({"max_length": 4}, DataError, "no room"),
        ({"model": {"model_type": "llama", "hidden_size": 8}}, BildungError, "lacks the key"),
        ({"model": {**CONFIG, "model_type": "distilbert"}}, BildungError, "unknown key"),
        ({"model": {**CONFIG, "model_type": "roberta"}}, BildungError, "no roberta has the heads mlm, nsp, pooler"),
        ({"held_out": 40}, DataError, "at least one must stay"),
    ],
)
def test_what_is_refused(
    words: Path, text: str, tmp_path: Path, change: dict[str, Any], error: type[BildungError], says: str
) -> None:
    refused(words, text, tmp_path / "out", change, error, says)


def test_models_that_cannot(words: Path, text: str, tmp_path: Path, tiny_lm_directory: Path) -> None:
    refused(tiny_lm_directory, text, tmp_path / "out", {"model": None}, DataError, "kind 'decoder'")
    masked(words, tmp_path / "mlm", given(text, objective="mlm", steps=1))
    refused(tmp_path / "mlm", text, tmp_path / "out", {"model": None}, DataError, "needs also pooler, nsp")

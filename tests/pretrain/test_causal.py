"""Birth: a model from a tokenizer, a config and text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import bildung
from bildung.core.errors import ConfigError, DataError, SettingsError
from bildung.core.operation import OccupiedError
from bildung.core.settings import resolve
from bildung.data.batches import Example
from bildung.pretrain import tokenize as tokenize_module
from bildung.pretrain.birth import set_aside
from bildung.pretrain.causal import Settings, causal, unigram_nats
from bildung.pretrain.tokenize import tokenize
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.history import METRICS
from bildung.train.live_page import NAME

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def as_given(text: str, **other: object) -> dict[str, object]:
    common = {"data": text, "model": MODEL, "steps": 60, "max_length": 64, "batch_size": 4, "held_out": 6}
    return {**common, "precision": "fp32", "learning_rate": 1e-2, **other}


def settings(text: str, **other: object) -> Settings:
    return Settings(**as_given(text, **other))  # type: ignore[arg-type]


def test_a_model_is_born_and_beats_the_unigram(
    tokenizer_directory: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    record = causal(tokenizer_directory, out, settings(text, sample_prompts=("the cat",), sample_tokens=4))
    measured = record.measured
    assert measured["held_out_bits_per_byte"] < measured["unigram_bits_per_byte"] / 2
    assert measured["kneser_ney_bits_per_byte"] < measured["unigram_bits_per_byte"]
    figures = [
        measured[name] for name in ("held_out_bits_per_byte", "unigram_bits_per_byte", "kneser_ney_bits_per_byte")
    ]
    said = "held out: {:.3f} bits per byte (each token's share of the training text: {:.3f}, Kneser-Ney: {:.3f})"
    assert said.format(*figures) in capsys.readouterr().out
    assert record.trained_tokens > 0 and record.after["samples"][0]["prompt"] == "the cat"
    lm = bildung.load(out)
    assert lm.config.vocab_size == Tokenizer.load(tokenizer_directory).vocab_size


def test_a_sample_that_does_not_fit_is_refused_before_training(
    tokenizer_directory: Path, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    with pytest.raises(SettingsError, match="exceed the model's context of 64"):
        causal(tokenizer_directory, out, settings(text, sample_prompts=("the cat",), sample_tokens=64))
    assert not out.exists() and not (tmp_path / "model.partial").exists()


def test_training_goes_on_from_a_model(tokenizer_directory: Path, text: str, tmp_path: Path) -> None:
    first = causal(tokenizer_directory, tmp_path / "one", settings(text))
    second = causal(tmp_path / "one", tmp_path / "two", settings(text, model=None))
    assert second.measured["held_out_bits_per_byte"] < first.measured["held_out_bits_per_byte"]
    assert [ancestor["operation"] for ancestor in second.ancestors] == ["pretrain causal"]


def test_killed_and_run_again_is_the_same_model(
    tokenizer_directory: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from bildung.train import training

    whole = tmp_path / "whole"
    causal(tokenizer_directory, whole, settings(text, checkpoint_every=5))
    real = training.fit

    def killed(*arguments: object, **named: object) -> object:
        real(*arguments, **{**named, "steps": 12})  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        causal(tokenizer_directory, tmp_path / "again", settings(text, checkpoint_every=5))
    monkeypatch.undo()
    causal(tokenizer_directory, tmp_path / "again", settings(text, checkpoint_every=5))
    one, two = (bildung.load(tmp_path / name).model.state_dict() for name in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_unigram_by_hand() -> None:
    counts_V, held = np.array([0, 2, 1, 0, 0]), Example([0, 1, 3], [False, True, True])
    assert unigram_nats(counts_V, [held]) == pytest.approx(-(math.log(3 / 8) + math.log(1 / 8)) / 2)


def test_what_cannot_be_born(tokenizer_directory: Path, text: str, tmp_path: Path) -> None:
    for change, error, words in (
        ({"data": f"x*{text}"}, SettingsError, "is not understood"),
        ({"curriculum": (100,)}, SettingsError, "from 2 to below"),
        ({"model": None}, SettingsError, "holds no model"),
        ({"model": {**MODEL, "model_type": "lama"}}, ConfigError, "did you mean 'llama'"),
        ({"model": {**MODEL, "hidden_sise": 3}}, ConfigError, "hidden_sise"),
        ({"model": {**MODEL, "vocab_size": 3}}, bildung.core.errors.BildungError, "vocab|rows|ids"),
        ({"model": "[1]"}, SettingsError, "mapping"),
        ({"held_out": 60}, DataError, "at least one must stay"),
        ({"learning_rate": 0.0}, SettingsError, "above 0"),
        ({"held_out_tokens": 0}, SettingsError, "at least 1"),
        ({"baseline_order": -1}, SettingsError, "at least 0"),
        ({"patience": 2}, SettingsError, "set evaluate_every"),
        ({"batch_size": 10**6}, SettingsError, "hold each of the data's rows"),
    ):
        with pytest.raises(error, match=words):
            causal(tokenizer_directory, tmp_path / "out", resolve(Settings, as_given(text, **change)))
        assert not (tmp_path / "out").exists()
    causal(tokenizer_directory, tmp_path / "model", settings(text, steps=1))
    with pytest.raises(SettingsError, match="holds a model already"):
        causal(tmp_path / "model", tmp_path / "out", settings(text))
    with pytest.raises(OccupiedError):
        causal(tokenizer_directory, tmp_path / "model", settings(text, steps=2))


def test_aside_and_kept_are_all() -> None:
    kept, aside = set_aside(range(10), 3, seed=1)
    assert sorted([*kept, *aside]) == list(range(10)) and len(aside) == 3


def test_mixtures_curricula_and_token_files(tokenizer_directory: Path, text: str, tmp_path: Path) -> None:
    encoded = tmp_path / "tokens"
    record = tokenize(tokenizer_directory, encoded, tokenize_module.Settings(data=text, held_out=6))
    assert record.measured["documents"] == 54 and (encoded / "tokenizer.json").exists()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"a dog of {n} years barks"}) for n in range(40)))
    given = settings(f"3*{encoded} + {other}", curriculum=(16,), evaluate_every=20, sample_prompts=("the cat",))
    made = causal(encoded, tmp_path / "model", given)
    assert made.measured["held_out_bits_per_byte"] < made.measured["unigram_bits_per_byte"]
    log = [json.loads(line) for line in (tmp_path / "model" / METRICS).read_text().splitlines()]
    assert [row["step"] for row in log if "samples" in row] == [20, 40, 60]
    assert log[-1]["samples"][0]["prompt"] == "the cat" and "http-equiv" in (tmp_path / "model" / NAME).read_text()
    assert not list((tmp_path / "model").glob(".tokens*"))
    plain = causal(encoded, tmp_path / "plain", settings(str(encoded)))
    again = causal(tokenizer_directory, tmp_path / "again", settings(text))
    # The same documents aside, the same rows: encoding beforehand changes nothing.
    assert plain.measured["held_out_bits_per_byte"] == again.measured["held_out_bits_per_byte"]


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "muon"},
        {"optimizer": "adafactor"},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "paged_adamw", "page_budget": 0.05},
        {"weights": "kahan"},
        {"l1": 0.3, "gradient_noise": 1e-6, "neftune": 1.0, "label_smoothing": 0.1},
        {"augment": {"share": 1.0, "drop": 0.1, "jostle": 1}},
    ],
    ids=str,
)
def test_every_optimizer_and_remedy_learns(
    tokenizer_directory: Path, text: str, tmp_path: Path, given: dict[str, object]
) -> None:
    record = causal(tokenizer_directory, tmp_path / "model", settings(text, **given))
    measured = record.measured
    assert measured["held_out_bits_per_byte"] < 0.8 * measured["unigram_bits_per_byte"]
    assert measured["optimizer_bytes"] > 0
    if "page_budget" in given:
        assert measured["optimizer_resident_bytes"] <= 50_000 < measured["optimizer_bytes"]
    if "l1" in given:
        weights = bildung.load(tmp_path / "model").model.model.layers[0].mlp.up_proj.weight()
        assert (weights == 0).any()

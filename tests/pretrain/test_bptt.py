"""Recurrent models born from text, read in streams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bildung
from bildung.core.errors import DataError, SettingsError
from bildung.pretrain import bptt as module
from bildung.pretrain.bptt import Settings, bptt
from bildung.run.generate import generate

MODEL = {"model_type": "rnn", "cell": "gru", "hidden_size": 48, "embedding_size": 32}


def settings(text: str, **other: object) -> Settings:
    given = {"data": text, "model": MODEL, "steps": 120, "window": 24, "batch_size": 4, "held_out": 6}
    return Settings(**{**given, "precision": "fp32", "learning_rate": 2e-2, "max_length": 64, **other})  # type: ignore[arg-type]


def test_a_recurrent_model_is_born_and_beats_the_unigram(tokenizer_directory: Path, text: str, tmp_path: Path) -> None:
    record = bptt(tokenizer_directory, tmp_path / "model", settings(text))
    measured = record.measured
    assert measured["held_out_bits_per_byte"] < measured["unigram_bits_per_byte"] / 2
    assert record.tokens_seen == 120 * 24 * 4
    lm = bildung.load(tmp_path / "model")
    assert generate(lm, "the cat number", new_tokens=8)


def test_killed_and_run_again_is_the_same_model(
    tokenizer_directory: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(text, steps=12, checkpoint_every=4)
    bptt(tokenizer_directory, tmp_path / "whole", given)
    calls = 0

    class Dies(module.Streams):
        def __call__(self, n: int) -> object:  # type: ignore[override]
            nonlocal calls
            calls += 1
            if calls == 7:
                raise KeyboardInterrupt
            return super().__call__(n)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "Streams", Dies)
        bptt(tokenizer_directory, tmp_path / "cut", given)
    bptt(tokenizer_directory, tmp_path / "cut", given)
    one, other = bildung.load(tmp_path / "whole").model, bildung.load(tmp_path / "cut").model
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_other_models_and_ways_are_refused(tokenizer_directory: Path, text: str, tmp_path: Path) -> None:
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    with pytest.raises(DataError, match="is for recurrent"):
        bptt(tokenizer_directory, tmp_path / "a", settings(text, model=llama))
    with pytest.raises(SettingsError, match="one process"):
        bptt(tokenizer_directory, tmp_path / "b", settings(text, parallel="ddp"))

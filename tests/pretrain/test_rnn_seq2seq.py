"""Recurrent seq2seq models learn letters to capitals: with each attention, and with scheduled sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import bildung
from bildung.core.record import Record
from bildung.pretrain.seq2seq import Settings, seq2seq
from tests.pretrain.test_seq2seq import reversals, words, write_rows

__all__ = ["words"]  # the fixture

MODEL: dict[str, Any] = {"model_type": "rnn_seq2seq", "hidden_size": 32, "embedding_size": 16}


def born(words: Path, tmp_path: Path, name: str, model: dict[str, Any], **other: Any) -> Record:
    given = {"data": write_rows(tmp_path / "train.jsonl", reversals(500, 1)), "model": {**MODEL, **model}}
    given |= {"steps": 120, "batch_size": 32, "max_length": 16, "precision": "fp32", "learning_rate": 1e-2}
    given |= {"metrics": ("per",), "weight_decay": 0.0, **other}
    return seq2seq(words, tmp_path / name, Settings(**given))


@pytest.mark.parametrize("attention", ["none", "bahdanau", "concat"])
def test_each_attention_learns(attention: str, words: Path, tmp_path: Path) -> None:
    record = born(words, tmp_path, "out", {"attention": attention, "cell": "lstm" if attention == "none" else "gru"})
    assert record.measured["per"] < 0.7 * record.measured["per_most_frequent"]
    assert bildung.load(tmp_path / "out").config.attention == attention


def test_scheduled_sampling_is_a_setting_and_a_run_of_its_own(words: Path, tmp_path: Path) -> None:
    sampled = {"scheduled_sampling": "linear", "least_true": 0.4, "steps": 40, "checkpoint_every": 0}
    record = born(words, tmp_path, "out", {"attention": "bahdanau"}, **sampled)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    shares = [row["true_share"] for row in rows if "true_share" in row]
    assert shares[0] == 1.0 and abs(shares[-1] - 0.4) < 0.02 and shares == sorted(shares, reverse=True)
    again = born(words, tmp_path, "again", {"attention": "bahdanau"}, **sampled)
    assert again.measured["loss_last"] == record.measured["loss_last"]
    forced = born(words, tmp_path, "forced", {"attention": "bahdanau"}, steps=40)
    assert forced.measured["loss_last"] < record.measured["loss_last"]

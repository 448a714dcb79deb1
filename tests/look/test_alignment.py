"""Alignments: rows that add up to 1, of recurrent and Transformer models; refused where there is no attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import bildung
from bildung.core.errors import SettingsError
from bildung.look.alignment import Settings, align, alignment
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from tests.conftest import tiny_tokenizer

KEYS: dict[str, Any] = {"vocab_size": 300, "hidden_size": 24, "initializer_range": 1.0, "bos_token_id": 0}
TRANSFORMER = {"model_type": "transformer", "intermediate_size": 32, "num_attention_heads": 2, "encoder_layers": 1}


def lm_of(**changes: Any) -> LanguageModel:
    keys = {**KEYS, "eos_token_id": 2, **changes}
    if keys["model_type"] == "transformer":
        keys.pop("initializer_range")
    config = from_dict(keys)
    return LanguageModel(build(config, seed=5).eval(), tiny_tokenizer(), config)


@pytest.mark.parametrize(
    "keys",
    [{"model_type": "rnn_seq2seq", "attention": "bahdanau"}, {"model_type": "rnn_seq2seq"}, TRANSFORMER],
    ids=["bahdanau", "general", "transformer"],
)
def test_alignments_are_distributions_over_the_source(keys: dict[str, Any], tmp_path: Path) -> None:
    lm = lm_of(**keys)
    found = align(lm, "the cat", new_tokens=5)
    assert found.source[-1] == "<|im_end|>" and len(found.answer) == len(found.weights) <= 5
    for row in found.weights:
        assert len(row) == len(found.source) and abs(sum(row) - 1) < 1e-2
    bildung.save(lm, tmp_path / "lm")
    record = alignment(tmp_path / "lm", tmp_path / "out", Settings(source=("the cat", "a", "Rome", "Paris", "the")))
    assert len(record.measured) == 5
    assert json.loads((tmp_path / "out/alignment.json").read_text())[0]["source"] == found.source
    assert (tmp_path / "out/alignment.png").stat().st_size > 5_000


def test_without_attention_there_is_nothing_to_draw() -> None:
    for lm in (lm_of(model_type="rnn_seq2seq", attention="none"), lm_of(model_type="rnn")):
        with pytest.raises(SettingsError, match="nothing to draw"):
            align(lm, "the cat")

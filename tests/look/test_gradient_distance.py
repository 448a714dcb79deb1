"""The gradient by distance: as the spectral radius says for a linear RNN, flat for an LSTM whose gates are open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.core.errors import DataError
from bildung.look.gradient_distance import Settings, gradient_distance, gradient_norms, rate
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from tests.conftest import tiny_tokenizer


def lm_of(**changes: Any) -> LanguageModel:
    keys = {"model_type": "rnn", "vocab_size": 300, "hidden_size": 24, "eos_token_id": 2, **changes}
    config = from_dict(keys)
    return LanguageModel(build(config, seed=3).eval(), tiny_tokenizer(), config)


def rate_of(lm: LanguageModel) -> float:
    return rate(gradient_norms(lm, torch.randint(3, 300, (4, 61), generator=torch.Generator().manual_seed(0))))


@pytest.mark.parametrize("radius", [0.8, 1.0, 1.25])
def test_a_linear_rnns_gradient_changes_by_its_spectral_radius_per_token(radius: float) -> None:
    assert abs(rate_of(lm_of(cell="rnn", hidden_act="identity", recurrent_scale=radius)) - radius) < 1e-3


def test_a_tanh_rnn_vanishes_and_an_open_lstm_does_not() -> None:
    assert rate_of(lm_of(cell="rnn", recurrent_scale=0.8)) < 0.81
    assert abs(rate_of(lm_of(cell="lstm", forget_bias=6.0, recurrent_scale=0.1)) - 1) < 0.02


def test_the_verb_draws_several_models(tiny_lm_directory: Path, tmp_path: Path) -> None:
    for name, radius in (("small", 0.8), ("large", 1.2)):
        bildung.save(lm_of(cell="rnn", hidden_act="identity", recurrent_scale=radius), tmp_path / name)
    given = Settings(against=(tmp_path / "large", tiny_lm_directory), rows=2, length=30)
    record = gradient_distance(tmp_path / "small", tmp_path / "out", given)
    assert abs(record.measured["small: rate"] - 0.8) < 5e-3 and abs(record.measured["large: rate"] - 1.2) < 5e-3
    numbers = json.loads((tmp_path / "out/gradient_distance.json").read_text())
    assert [len(one["norms"]) for one in numbers.values()] == [30, 30, 30]
    assert (tmp_path / "out/gradient_distance.png").stat().st_size > 10_000
    with pytest.raises(DataError, match="lower rows or length"):
        gradient_distance(tmp_path / "small", tmp_path / "more", Settings(rows=10**6))

"""What a model that answers sources cannot do, it says; what every model can, it does."""

from __future__ import annotations

from pathlib import Path

import pytest

import bildung
from bildung.align.dpo import Settings as Dpo
from bildung.align.dpo import dpo
from bildung.compress.quantize import Settings as Quantize
from bildung.compress.quantize import quantize
from bildung.core.errors import DataError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.tune.full import Settings as Full
from bildung.tune.full import full
from bildung.tune.lora import Settings as Lora
from bildung.tune.lora import lora
from tests.conftest import tiny_tokenizer
from tests.run.test_sources import CONFIG


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = build(from_dict({**CONFIG, "hidden_size": 64, "intermediate_size": 128}), seed=1).eval()
    return bildung.save(LanguageModel(model, tiny_tokenizer(), model.config), tmp_path / "model")


def test_it_is_tuned_on_sources_and_targets_and_preferences_are_refused(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = dict(data="mini:instructions", steps=2, precision="fp32", max_length=64, checkpoint_every=0)
    for name, run, settings in (("lora", lora, Lora(**given)), ("full", full, Full(**given))):
        assert run(directory, tmp_path / name, settings).trained_tokens > 0
    with pytest.raises(DataError, match="pretrain seq2seq"):
        dpo(directory, out, Dpo(data="mini:preferences", steps=1))


def test_quantization_compares_on_texts_read_as_sources(directory: Path, tmp_path: Path) -> None:
    record = quantize(directory, tmp_path / "out", Quantize(method="nf4", compare_texts=1))
    assert 0 < record.measured["kl_mean"] < 1
    assert bildung.generate(bildung.load(tmp_path / "out"), "hello", new_tokens=4)

"""QLoRA: the published settings, over NF4 and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bildung
from bildung.compress.quantize import Settings as Quantize
from bildung.compress.quantize import quantize
from bildung.core.errors import ModelFileError
from bildung.core.recipe import read_recipe
from bildung.core.settings import resolve
from bildung.model.quantized import Nf4
from bildung.tune.merge import Settings as Merge
from bildung.tune.merge import merge
from bildung.tune.qlora import Settings, qlora

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nf4(tiny_lm_directory, tmp_path):
    quantize(tiny_lm_directory, tmp_path / "nf4", Quantize(method="nf4"))
    return tmp_path / "nf4"


def test_the_published_recipe_is_the_default():
    """qlora's finetune_guanaco_7b.sh."""
    given = Settings(data="x")
    assert (given.rank, given.alpha, given.dropout, given.target) == (64, 16, 0.1, "all")
    assert (given.learning_rate, given.schedule, given.warmup) == (2e-4, "constant", 0.03)
    assert (given.optimizer, given.clip, given.batch_size * given.micro_steps) == ("paged_adamw", 0.3, 16)


def test_trained_over_four_bits_loaded_and_merged(nf4, given, tmp_path, logits):
    record = qlora(nf4, tmp_path / "out", Settings(**{**given, "rank": 4, "dropout": 0.0}))
    assert record.measured["loss_last"] < record.measured["loss_first"]
    lm = bildung.load(tmp_path / "out")
    chosen = [linear for linear in lm.model.linears().values() if linear.deltas]
    assert len(chosen) == 14 and all(isinstance(linear.base, Nf4) for linear in chosen)
    assert lm.base is not None and lm.base.samefile(nf4)
    held = sum(linear.base.stored_bytes for linear in lm.model.linears().values())
    assert record.measured["base_matrix_bytes"] == held
    merge(tmp_path / "out", tmp_path / "merged", Merge(dtype="float32"))
    merged = bildung.load(tmp_path / "merged")
    assert not any(isinstance(linear.base, Nf4) for linear in merged.model.linears().values())
    torch.testing.assert_close(logits(merged), logits(lm), atol=1e-4, rtol=1e-4)


def test_another_base_is_refused(tiny_lm_directory, given, tmp_path):
    with pytest.raises(ModelFileError, match=r"not in NF4.*quantize"):
        qlora(tiny_lm_directory, tmp_path / "out", Settings(**{**given, "rank": 4}))


def test_the_shipped_recipe_can_be_read():
    recipe = read_recipe(ROOT / "recipes/qlora.yaml")
    asked = {}
    for step in recipe.steps:
        kind = step.verb.load().Settings
        asked[step.name] = resolve(kind, step.settings(kind))
    plain, over = asked["tuned-lora"], asked["tuned-qlora"]
    names = "rank alpha dropout learning_rate schedule warmup clip batch_size micro_steps steps held_out"
    for name in names.split():
        assert getattr(plain, name) == getattr(over, name), name

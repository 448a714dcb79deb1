"""A weighted sum of adapters as one adapter."""

from __future__ import annotations

import pytest
import torch

import bildung
from bildung.core.errors import AdapterError, SettingsError
from bildung.model.linear import match_linears
from bildung.tune.combine import Settings, combine
from bildung.tune.lora import Settings as LoraSettings
from bildung.tune.lora import lora
from bildung.tune.prompt import Settings as PromptSettings
from bildung.tune.prompt import prompt


@pytest.fixture
def pair(tiny_lm_directory, given, tmp_path):
    """Two LoRAs of other ranks on other matrices."""
    for name, changes in (("a", dict(rank=2, target="q_proj")), ("b", dict(rank=3, alpha=5.0, seed=1))):
        lora(tiny_lm_directory, tmp_path / name, LoraSettings(**given, **changes))
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("weights", [None, (0.5, -2.0)])
def test_the_sum_of_the_updates(tiny_lm_directory, pair, tmp_path, weights):
    record = combine(tiny_lm_directory, tmp_path / "sum", Settings(adapters=pair, weights=weights))
    one, two = weights or (1.0, 1.0)
    models = {name: bildung.load(tmp_path / name).model for name in ("a", "b", "sum")}
    base = bildung.load(tiny_lm_directory).model.linears()
    for name in match_linears(models["sum"], "all"):
        W, a, b, both = (m[name].weight() for m in (base, *(models[key].linears() for key in ("a", "b", "sum"))))
        torch.testing.assert_close(both, W + one * (a - W) + two * (b - W), atol=1e-5, rtol=1e-5)
    assert record.measured["rank"] == 5 and set(record.companions) == {"adapter 1", "adapter 2"}


def test_the_cosine_is_that_of_the_updates(tiny_lm_directory, pair, tmp_path):
    record = combine(tiny_lm_directory, tmp_path / "sum", Settings(adapters=pair))
    base = bildung.load(tiny_lm_directory).model.linears()
    a, b = (
        torch.cat([(m[name].weight() - W.weight()).detach().flatten() for name, W in base.items()])
        for m in (bildung.load(path).model.linears() for path in pair)
    )
    (found,) = record.measured["cosine"].values()
    assert found == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-4)
    twice = combine(tiny_lm_directory, tmp_path / "twice", Settings(adapters=(pair[0], pair[0])))
    assert list(twice.measured["cosine"].values()) == [pytest.approx(1.0)]


def test_bad_requests(tiny_lm_directory, pair, given, tmp_path):
    with pytest.raises(SettingsError, match="at least two"):
        combine(tiny_lm_directory, tmp_path / "x", Settings(adapters=pair[:1]))
    with pytest.raises(SettingsError, match="2 adapters need as many"):
        combine(tiny_lm_directory, tmp_path / "x", Settings(adapters=pair, weights=(1.0,)))
    with pytest.raises(AdapterError, match="no adapter directory"):
        combine(tiny_lm_directory, tmp_path / "x", Settings(adapters=(pair[0], tiny_lm_directory)))
    prompt(tiny_lm_directory, tmp_path / "prompt", PromptSettings(**{**given, "steps": 1}, length=2))
    with pytest.raises(AdapterError, match="one set"):
        combine(tiny_lm_directory, tmp_path / "x", Settings(adapters=(pair[0], tmp_path / "prompt")))
    lora(tiny_lm_directory, tmp_path / "dora", LoraSettings(**{**given, "steps": 1}, dora=True))
    with pytest.raises(AdapterError, match="only LoRA adapters add up"):
        combine(tiny_lm_directory, tmp_path / "x", Settings(adapters=(pair[0], tmp_path / "dora")))

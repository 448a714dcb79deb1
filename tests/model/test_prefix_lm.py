"""A decoder of any family becomes a prefix language model without another weight, and its directory says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bildung
from bildung.core.errors import ConfigError, SettingsError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.prefix_lm import as_prefix_lm, make_prefix_lm
from bildung.model.store import LanguageModel
from tests.contract.test_families import CONFIGS, KINDS
from tests.model.tiny import tiny_decoder, tiny_lm, tokens


@pytest.mark.parametrize("family", [name for name, kind in KINDS.items() if kind == "decoder"])
def test_the_directory_keeps_the_weights_and_the_reading(family: str, tmp_path: Path) -> None:
    model = build(from_dict({"model_type": family, **CONFIGS[family]}), seed=1).eval()
    before = model.config
    prefix_BL = torch.arange(11)[None].expand(2, -1) < 6
    with torch.no_grad():
        expected, plain = model(tokens(), prefix_BL=prefix_BL), model(tokens())
    make_prefix_lm(model, "text")
    assert (model.config.model_type, model.config.prefix_lm, model.prefix_lm) == ("bildung", "text", True)
    assert replace(model.config, model_type=family, prefix_lm=None) == before
    again = bildung.load(bildung.save(LanguageModel(model, tiny_lm().tokenizer, model.config), tmp_path / "out"))
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again.model(tokens(), prefix_BL=prefix_BL), expected)
        assert torch.equal(again.model(tokens()), plain) and not torch.allclose(plain, expected)


def test_what_has_no_words_there_is_refused() -> None:
    config = replace(tiny_decoder().config, position_offset=2)
    with pytest.raises(
        ConfigError, match=r"a llama with position_offset = 2 cannot be written as model_type 'bildung'"
    ):
        as_prefix_lm(config, "text")


def test_a_prefix_comes_first() -> None:
    model = tiny_decoder()
    cache = model.kv_cache(2, 20)
    model.hidden(tokens(), kv_cache=cache)
    with pytest.raises(SettingsError, match="a prefix is read whole, before all else"):
        model.hidden(tokens()[:, :3], prefix_BL=torch.ones(2, 3, dtype=torch.bool), kv_cache=cache)

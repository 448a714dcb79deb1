"""Patchscopes on every family that continues text and every way its weights are stored: exam row 31, and the cache."""

from __future__ import annotations

import pytest
import torch

from bildung.core.errors import DataError
from bildung.look.lens import lens_logits
from bildung.look.patch_targets import target_prompt
from bildung.look.patchscopes import Cell, identity, mapped, patched_logits, patchscope, streams
from bildung.model.base import CausalLM
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import replace_stores
from bildung.model.quantized import METHODS
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene
from tests.contract.test_families import CONFIGS
from tests.model.tiny import tiny_lm

TEXT = "Paris is in France"
MADE = {family: from_dict({"model_type": family, **keys}) for family, keys in CONFIGS.items()}
WRITERS = [family for family, config in MADE.items() if isinstance(build(config, 3), CausalLM)]


def made(family: str, stored: str = "") -> LanguageModel:
    lm = LanguageModel(build(MADE[family], 3).eval(), tiny_lm().tokenizer, MADE[family])
    if stored:
        replace_stores(lm.model, "all", lambda linear: METHODS[stored].quantize(linear.base.dense().detach()))
    return lm


@pytest.mark.parametrize(
    ("family", "stored"), [*((family, "") for family in WRITERS), ("llama", "nf4"), ("gpt2", "int8")]
)
def test_the_identity_into_the_last_layer_is_the_logit_lens(family: str, stored: str) -> None:
    lm = made(family, stored)
    last = lm.config.num_hidden_layers - 1
    tokens, target = lm.tokenizer.encode(TEXT), target_prompt(lm, "x y {}")
    cells = [Cell(5, layer, last) for layer in range(last + 1)]
    h_RE, _ = mapped(lm, lm, tokens, cells, identity)
    h_NLD, _ = streams(lm, tokens)
    assert torch.equal(
        patched_logits(lm.model, target, h_RE, [last] * len(cells)), lens_logits(lm.model, h_NLD[:, 5].contiguous())
    )


@pytest.mark.parametrize("family", WRITERS)
def test_the_cache_of_what_lies_before_changes_nothing(family: str) -> None:
    lm = made(family)
    tokens, target = lm.tokenizer.encode(TEXT), target_prompt(lm, "x {} y")
    found = patchscope(lm, tokens, target, [Cell(5, 0, 0)], new_tokens=3)
    h_NLD, _ = streams(lm, tokens)

    def put(x_BLD: torch.Tensor) -> torch.Tensor:
        x_BLD = x_BLD.clone()
        x_BLD[:, target.position] = h_NLD[0, 5]
        return x_BLD

    with torch.no_grad(), intervene(lm.model, {"layers.0.resid_post": put}):
        ids = list(target.tokens)
        for _ in range(3):
            ids.append(int(lm.model(torch.tensor([ids]))[0, -1, : lm.tokenizer.vocab_size].argmax()))
            if ids[-1] in lm.tokenizer.stop_ids:
                break
    written = [one for one in ids[len(target.tokens) :] if one not in lm.tokenizer.stop_ids]
    whole = lm.tokenizer.decode(target.tokens + written, skip_special=True)
    assert found.texts[0] == whole[len(lm.tokenizer.decode(target.tokens)) :]


@pytest.mark.parametrize("family", [family for family in MADE if family not in WRITERS])
def test_others_are_refused(family: str) -> None:
    lm = made(family)
    target = target_prompt(tiny_lm(), "x {}")
    with pytest.raises(DataError, match="does not continue text"):
        patchscope(lm, [5, 6, 7], target, [Cell(0, 0, 0)])

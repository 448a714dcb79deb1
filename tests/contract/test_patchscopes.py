"""Patchscopes on every family that continues text and every way its weights are stored: exam row 31, and the cache."""

from __future__ import annotations

import pytest
import torch

from bildung.core.errors import DataError
from bildung.look.lenses.lens import lens_logits
from bildung.look.patchscopes.patch_targets import target_prompt
from bildung.look.patchscopes.patchscopes import Cell, identity, mapped, patched_logits, patchscope, reader_of, streams
from bildung.look.prompt import encode_prompt, half
from bildung.model.base import CausalLM
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import replace_stores
from bildung.model.quantized import METHODS
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene
from bildung.run.write import write
from tests.contract.test_families import CONFIGS
from tests.model.tiny import tiny_lm
from tests.model.tiny_encoder import tiny_encoder

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


@pytest.mark.parametrize("family", [family for family in MADE if MADE[family].kind == "encoder-decoder"])
def test_both_halves_of_an_encoder_decoder(family: str) -> None:
    """The decoder's last layer is the logit lens; a vector put where it came from in the encoder changes nothing."""
    lm = made(family)
    decoder, last = half(lm, "decoder"), lm.config.num_hidden_layers - 1
    tokens, target = encode_prompt(decoder, TEXT, False, 64), target_prompt(decoder, "x y {}")
    h_RE, said_R = mapped(decoder, decoder, tokens, [Cell(5, layer, last) for layer in range(last + 1)], identity)
    h_NLD, next_L = streams(decoder, tokens)
    assert said_R is not None and next_L is not None and (said_R == next_L[5]).all()
    found = patched_logits(reader_of(decoder), target, h_RE, [last] * (last + 1))
    torch.testing.assert_close(found, lens_logits(decoder.model, h_NLD[:, 5].contiguous()), atol=1e-5, rtol=1e-5)
    encoder = half(lm, "encoder")
    target = target_prompt(encoder, "Paris is in {}")
    own, other = (encode_prompt(encoder, text, False, 64) for text in ("Paris is in x", "London is in y"))
    same, unlike = (
        patchscope(encoder, ids, target, [Cell(target.position, 1, 1)], new_tokens=4) for ids in (own, other)
    )
    text = write(lm.model, lm.tokenizer, [target.tokens], 4)[0][0].text
    with torch.no_grad():
        probs_V = lm.model(torch.tensor([target.tokens]), torch.tensor([[258]]))[0, -1].softmax(-1)
    torch.testing.assert_close(same.top_probs_RK[0], probs_V.topk(5).values, atol=1e-5, rtol=1e-4)
    assert same.texts == [text] and not torch.allclose(same.top_probs_RK, unlike.top_probs_RK, atol=1e-5)
    assert same.expected_R is None


def test_a_masked_encoder_explains_and_is_explained() -> None:
    lm, writer = tiny_encoder(initializer_range=0.3), made("llama")
    target = target_prompt(lm, "the {} sat on a [MASK]")
    tokens = encode_prompt(lm, "the x sat on a [MASK]", False, 64)
    found = patchscope(lm, tokens, target, [Cell(2, 0, 0), Cell(3, 0, 0)], new_tokens=4)
    with torch.no_grad():
        probs_V = lm.model(torch.tensor([tokens]))[0, tokens.index(lm.tokenizer.id_of("[MASK]"))].softmax(-1)
    torch.testing.assert_close(found.top_probs_RK[0], probs_V.topk(5).values)
    assert not torch.allclose(found.top_probs_RK[0], found.top_probs_RK[1]) and found.texts == ["", ""]
    into = target_prompt(writer, "a {} b")
    cells = [Cell(2, 0, 1)]
    assert patchscope(lm, tokens, into, cells, into=writer, f=lambda h, a, b: h.repeat(1, 2)[:, :48]).expected_R is None


@pytest.mark.parametrize("family", [family for family in MADE if family not in WRITERS])
def test_others_are_refused(family: str) -> None:
    lm = made(family)
    target = target_prompt(tiny_lm(), "x {}")
    with pytest.raises(DataError, match=r"no one stream of vectors|exactly one mask token|no class, no next token"):
        patchscope(lm, [5, 6, 7], target, [Cell(0, 0, 0)])

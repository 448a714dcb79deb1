"""Direct logit attribution: the shares add up to the logits in every kind of stack, and are what their names say."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bildung
from bildung.core.errors import DataError
from bildung.look import attribution as operation
from bildung.look.asked import with_source
from bildung.look.attribution import attribute
from bildung.look.contributions.decompose import decompose
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import replace_stores
from bildung.model.quantized import Nf4
from bildung.model.store import LanguageModel
from bildung.model.taps import attach, intervene, observe
from tests.contract.test_families import CONFIGS, TARGET, made
from tests.model.test_linear import with_lora
from tests.model.test_taps import Scale
from tests.model.tiny import tiny_decoder, tiny_lm

DECODERS = ["llama", "gpt2", "gemma3_text", "gpt_neox", "qwen2", "qwen3", "mistral", "bildung"]
STACKS = {
    "post-norm": dict(intermediate_size=80, norm_placement="post", positions="learned", norm="layer", qkv_bias=True),
    "attention only": dict(mlp=False, norm="layer", o_bias=True),
}


@pytest.mark.parametrize("family", DECODERS)
def test_shares_add_up_to_every_logit(family: str) -> None:
    model = made(family).model
    tokens = TARGET[:1]
    with torch.no_grad():
        logits_LV = model(tokens)[0]
    for place in (-1, 4):
        found = decompose(model, tokens, list(range(260)), place)
        torch.testing.assert_close(found.matrix().sum(0).float(), logits_LV[place], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found.logits_T.float(), logits_LV[place], atol=1e-4, rtol=1e-5)
        heads = found.heads_NHT()
        assert found.sources_NHST is not None and found.neurons_NFT is not None
        torch.testing.assert_close(found.sources_NHST.sum(2), heads, atol=1e-4, rtol=1e-4)
        assert (found.sources_NHST[:, :, (place % 11) + 1 :] == 0).all()
        mlps = torch.stack([found.shares[f"layers.{n}.mlp"] for n in range(len(heads))])
        torch.testing.assert_close(found.neurons_NFT.sum(1), mlps)


@pytest.mark.parametrize("stack", STACKS)
def test_shares_add_up_where_norms_stand_elsewhere_or_layers_are_missing(stack: str) -> None:
    keys = {name: value for name, value in CONFIGS["llama"].items() if name != "intermediate_size"}
    keys |= {"model_type": "bildung", **STACKS[stack]}
    model = build(from_dict(keys), seed=3).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "running" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    found = decompose(model, TARGET[:1], list(range(260)))
    with torch.no_grad():
        torch.testing.assert_close(found.matrix().sum(0).float(), model(TARGET[:1])[0, -1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart", "transformer"])
def test_shares_of_an_answer_add_up_with_the_heads_that_read_the_source(family: str) -> None:
    lm = with_source(made(family), [5, 6, 7, 8, 257])
    with torch.no_grad():
        logits_LV = lm.model(TARGET[:1])[0]
    found = decompose(lm.model, TARGET[:1], list(range(260)), 4)
    torch.testing.assert_close(found.matrix().sum(0).float(), logits_LV[4], atol=1e-4, rtol=1e-5)
    assert found.cross_sources_NHST is not None and found.cross_sources_NHST.shape[2] == 5
    torch.testing.assert_close(found.cross_sources_NHST.sum(2), found.heads_NHT("cross"), atol=1e-4, rtol=1e-4)
    with intervene(lm.model, {"decoder.layers.1.cross.z[:, 4, 2]": torch.zeros_like}):
        assert (decompose(lm.model, TARGET[:1], [8], 4).shares["layers.1.cross.head.2"] == 0).all()
    told = attribute(made(family), [5, 6, 7, 8, 257], answer=[258, 9], target=11)
    assert sum(told.shares.values()) == pytest.approx(told.logit, abs=1e-4) and len(told.source_labels) == 5


def test_shares_of_a_class() -> None:
    config = from_dict({"model_type": "llama", **CONFIGS["llama"], "architectures": ["LlamaForSequenceClassification"],
                        "id2label": {"0": "bad", "1": "good"}})  # fmt: skip
    lm = LanguageModel(build(config, seed=3).eval(), tiny_lm().tokenizer, config)
    found = attribute(lm, "ab cd", target="good", against="bad")
    with torch.no_grad():
        bad, good = lm.model(torch.tensor([found.tokens]))[0].tolist()
    assert found.logit == pytest.approx(good - bad, abs=1e-5)
    assert sum(found.shares.values()) == pytest.approx(good - bad, abs=1e-5) and found.target == (1, "good")


@pytest.mark.parametrize("variant", ["tuned", "quantized"])
def test_shares_of_changed_weights(variant: str) -> None:
    model = tiny_decoder()
    if variant == "tuned":
        with_lora(model)
    else:
        replace_stores(model, "all", lambda linear: Nf4.quantize(linear.base.dense()))
    tokens = torch.tensor([[5, 9, 17, 4]])
    found = decompose(model, tokens, [3, 8])
    with torch.no_grad():
        expected = model(tokens)[0, -1, [3, 8]]
    torch.testing.assert_close(found.matrix().sum(0).float(), expected, atol=1e-4, rtol=1e-5)


def test_a_heads_share_is_the_direct_path_of_its_result() -> None:
    """Golden: with the final norm's scale held, taking the head's result away lowers the logit by its share."""
    model = tiny_decoder()
    tokens = torch.tensor([[5, 9, 17, 4]])
    with observe(model, ["layers.1.attn.result", "layers.1.resid_post"]) as seen, torch.no_grad():
        model(tokens)
    norm, h = model.model.norm, seen["layers.1.resid_post"][0, -1]
    direct = seen["layers.1.attn.result"][0, -1, 4] * norm.weight * torch.rsqrt(h.square().mean() + norm.eps)
    found = decompose(model, tokens, [8])
    expected = (direct @ model.lm_head.weight()[8]).item()
    assert found.shares["layers.1.attn.head.4"].item() == pytest.approx(expected, abs=1e-5)
    with intervene(model, {"layers.1.attn.z[:, -1, 4]": torch.zeros_like}):
        assert decompose(model, tokens, [8]).shares["layers.1.attn.head.4"].item() == 0


def test_the_page_the_numbers_and_what_is_refused(tmp_path: Path) -> None:
    lm = tiny_lm()
    place = bildung.save(lm, tmp_path / "lm")
    settings = operation.Settings(prompt="a <b> & $x$", target="c", against="d")
    half = bildung.save(replace(lm, model=copy.deepcopy(lm.model).bfloat16()), tmp_path / "half")
    operation.attribution(half, tmp_path / "of_half", settings)
    shares = json.loads((tmp_path / "of_half" / "attribution.json").read_text(encoding="utf-8"))
    wide, narrow = (
        attribute(bildung.load(half, kind), "a <b> & $x$", target="c", against="d") for kind in ("float32", None)
    )
    assert shares["logit"] == pytest.approx(wide.logit, rel=1e-4) and wide.logit != pytest.approx(
        narrow.logit, rel=1e-3
    )
    record = operation.attribution(place, tmp_path / "out", settings)
    numbers = json.loads((tmp_path / "out" / "attribution.json").read_text(encoding="utf-8"))
    found = attribute(lm, "a <b> & $x$", target="c", against="d")
    assert numbers["logit"] == pytest.approx(found.logit, rel=1e-3)
    assert sum(one["share"] for one in numbers["shares"]) == pytest.approx(found.logit, abs=1e-3)
    with torch.no_grad():
        logits = lm.model(torch.tensor([found.tokens]))[0, -1]
    c, d = (lm.tokenizer.encode(letter, bos=False)[0] for letter in "cd")
    assert found.logit == pytest.approx((logits[c] - logits[d]).item(), abs=1e-4)
    html = (tmp_path / "out" / "attribution.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in html and "<b> &" not in html and record.measured["logit"] == pytest.approx(found.logit)
    for wrong in (10**6, -1, True):
        with pytest.raises(DataError, match=f"{wrong} is not a token id"):
            attribute(lm, "ab", target=wrong)
    with pytest.raises(DataError, match="'xyz' is 3 tokens"):
        attribute(lm, "abc", target="xyz")
    with pytest.raises(DataError, match="position 9 is not among"):
        attribute(lm, "abc", position=9)
    attach(lm.model, "layers.0.mlp.out", Scale(0.3))
    with pytest.raises(DataError, match=r"attached at layers\.0\.mlp\.out"):
        attribute(lm, "abc")
    for family, why in (("rnn", "no sum of what its parts write"), ("bert", "a layer that is not linear")):
        with pytest.raises(DataError, match=why):
            decompose(made(family).model, TARGET[:1], [3])

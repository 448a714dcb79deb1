"""QK, OV and composition: the factors are what the models compute with, and every figure from the small side equals the
dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bildung.core.errors import DataError
from bildung.look.attention_heads.composition import baseline, composition, composition_with
from bildung.look.attention_heads.factored import Factored, positive_share
from bildung.look.attention_heads.head_weights import (
    LayerHeads,
    copying,
    embedding,
    head_weights,
    matching,
    stack_of,
    through,
    unembedding,
)
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.layers import LayerNorm
from bildung.model.linear import match_linears, replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.nf4 import Nf4
from bildung.model.taps import observe
from tests.contract.test_families import CONFIGS
from tests.look.induction_model import INDUCTION, PREVIOUS, induction_lm
from tests.model.tiny import tiny_decoder, tokens


def test_a_product_answers_from_its_factors_what_the_dense_matrix_would() -> None:
    random = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(2, *shape, generator=random).double() for shape in ((9, 3), (3, 9), (9, 4), (4, 9)))
    one, two = Factored(a, b), Factored(c, d)
    dense = one.dense()
    assert one.shape == dense.shape == (2, 9, 9)
    assert torch.allclose(one.trace(), dense.diagonal(0, -2, -1).sum(-1))
    assert torch.allclose(one.eigenvalues().sum(-1).real, one.trace())
    expected = torch.linalg.eigvals(dense)
    largest = expected.abs().sort(descending=True).values[:, :3]
    assert torch.allclose(one.eigenvalues().abs().sort(descending=True).values, largest)
    assert torch.allclose(one.norm(), dense.norm(dim=(-2, -1)))
    assert torch.allclose(one.singular_values(), torch.linalg.svdvals(dense)[:, :3])
    assert torch.allclose((one @ two).dense(), dense @ two.dense()) and (two @ one).a_mr.shape[-1] == 3
    assert torch.allclose(one.mT.dense(), dense.mT)
    assert torch.allclose((one @ c).dense(), dense @ c)
    with pytest.raises(DataError, match="do not fit"):
        Factored(a, d)
    with pytest.raises(DataError, match="no eigenvalues"):
        _ = Factored(a, b[..., :5]).eigenvalues()
    assert positive_share(Factored(a, a.mT).eigenvalues()).tolist() == pytest.approx([1, 1])
    assert positive_share(Factored(a, -a.mT).eigenvalues()).tolist() == pytest.approx([-1, -1])


def lora(model: nn.Module) -> None:
    for number, linear in enumerate(match_linears(model, "self_attn.*").values()):
        delta = LowRank(linear.in_features, linear.out_features, rank=3, scaling=2.0)
        torch.manual_seed(number)
        nn.init.normal_(delta.lora_B, std=0.1)
        linear.deltas["tuned"] = delta


def nf4(model: nn.Module) -> None:
    replace_stores(model, "self_attn.*", lambda linear: Nf4.quantize(linear.base.dense().detach()))


def plain(model: nn.Module) -> None:
    pass


BILDUNG: dict[str, Any] = dict(model_type="bildung", num_key_value_heads=3, intermediate_size=320)
GPT2: dict[str, Any] = dict(
    model_type="gpt2", vocab_size=101, n_embd=192, n_layer=2, n_head=6, n_positions=64, initializer_range=0.1
)


@pytest.mark.parametrize("change", [plain, lora, nf4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**BILDUNG, "rms_norm_eps": None, "norm": "rms", "norm_offset": 1.0, "rotary_dim": 16, "attention_scale": 0.3},
        {**BILDUNG, "rms_norm_eps": None, "norm": "layer", "layer_scale": 0.5, "qkv_bias": False},
        GPT2,
    ],
    ids=["llama", "partial", "layer", "gpt2"],
)
def test_circuits_are_what_the_model_computes(changes: dict[str, Any], change: Any) -> None:
    """Scores and outputs of every head, at every distance, from the streams: the model's own."""
    model = build(from_dict(changes), seed=3).eval() if changes is GPT2 else tiny_decoder(**changes)
    for name, parameter in model.named_parameters():  # norms that start at 1 would hide a weight that is not folded in
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    change(model)
    length = 7
    read = tokens(1, length)
    with torch.no_grad(), observe(model, "layers.*") as seen:
        model(read)
    for number in range(2):
        x_LD = seen[f"layers.{number}.resid_pre"][0]
        block: Any = stack_of(model).layers[number]
        x_LD = x_LD / _size(x_LD, block.input_layernorm)
        scores_NLS = torch.stack(
            [_scores(model, number, x_LD, distance) for distance in range(length)]
        )  # by distance: d N L S
        for query in range(length):
            for key in range(query + 1):
                there = seen[f"layers.{number}.attn.scores"][0, :, query, key]
                assert torch.allclose(scores_NLS[query - key, :, query, key], there, atol=1e-4)
        probs_NLS = seen[f"layers.{number}.attn.probs"][0]
        heads = head_weights(model)[number]
        out_LD = torch.einsum("nls,sd,nde->le", probs_NLS, x_LD, heads.ov.dense().mT)
        added = seen[f"layers.{number}.resid_mid"][0] - seen[f"layers.{number}.resid_pre"][0]
        assert torch.allclose(out_LD, added, atol=1e-4)


def _size(x_LD: Tensor, norm: Any) -> Tensor:
    if isinstance(norm, LayerNorm):
        return (x_LD.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return (x_LD.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def _scores(model: Any, number: int, x_LD: Tensor, distance: int) -> Tensor:
    return x_LD @ head_weights(model, distances=(distance,))[number].qk.dense() @ x_LD.T


def test_full_circuits_from_the_small_side_are_the_dense_ones() -> None:
    model = tiny_decoder(tie_word_embeddings=False)
    for norm in (model.model.norm, model.model.layers[1].input_layernorm):
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    e_VD, u_VD = embedding(model), unembedding(model)
    assert torch.allclose(u_VD, model.lm_head.weight() * model.model.norm.weight)
    layer = head_weights(model)[1]
    assert layer.key_value_head == (0, 0, 0, 1, 1, 1)
    assert torch.equal(layer.v_NHD[0], layer.v_NHD[2]) and not torch.equal(layer.v_NHD[0], layer.v_NHD[3])
    full_ov = u_VD.double() @ layer.ov.dense().double() @ e_VD.T.double()  # V x V
    full_qk = e_VD.double() @ layer.qk.dense().double() @ e_VD.T.double()
    assert torch.allclose(
        copying(layer, through(e_VD, u_VD)).double(), positive_share(torch.linalg.eigvals(full_ov)), atol=1e-4
    )
    assert torch.allclose(matching(layer, e_VD).double(), positive_share(torch.linalg.eigvals(full_qk)), atol=1e-4)
    with torch.no_grad():  # a head that writes what it reads, read out by its own embedding, copies
        o, v = (
            match_linears(model, f"layers.1.*.{name}")[f"model.layers.1.self_attn.{name}"]
            for name in ("o_proj", "v_proj")
        )
        model.model.norm.weight.fill_(1)
        model.lm_head.base.weight.copy_(model.model.embed_tokens.weight)
        model.model.layers[1].input_layernorm.weight.fill_(1)
        o.base.weight[:, :64] = v.base.weight[:64].T
        o.base.weight[:, 64:128] = -v.base.weight[:64].T
    found = copying(head_weights(model)[1], through(embedding(model), unembedding(model)))
    assert found[:2].tolist() == pytest.approx([1, -1], abs=1e-3)


def test_composition_is_the_dense_formula_and_chance_is_its_mean_over_rotations() -> None:
    layers = head_weights(tiny_decoder())
    found = composition(layers)
    qk, ov, earlier = layers[1].qk.dense(), layers[1].ov.dense(), layers[0].ov.dense()
    left = {"Q": qk.mT, "K": qk, "V": ov}
    for kind, scores_MM in found.items():
        product = left[kind][:, None] @ earlier[None]
        expected = product.norm(dim=(-2, -1)) / (left[kind].norm(dim=(-2, -1))[:, None] * earlier.norm(dim=(-2, -1)))
        assert torch.allclose(scores_MM[6:, :6], expected, atol=1e-5)
        assert scores_MM[:6].isnan().all() and scores_MM[6:, 6:].isnan().all()
        one = composition_with(layers, (0, 4), (kind,))[kind]
        assert torch.allclose(one[1], expected[:, 4], atol=1e-5) and one[0].isnan().all()
    random = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(40):
        rotation = torch.linalg.qr(torch.randn(192, 192, generator=random)).Q
        turned = qk[0] @ rotation @ earlier[0]
        squares.append((turned.norm() / qk[0].norm() / earlier[0].norm()).square())
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(baseline(192), rel=0.03)


def test_composition_and_eigenvalues_are_those_of_transformer_lens() -> None:
    """TransformerLens 2.16.1: utils.composition_scores(left, right) and FactoredMatrix.eigenvalues of these factors."""
    random = torch.Generator().manual_seed(1)
    o2, v2, o1, v1 = (torch.randn(2, *shape, generator=random) for shape in ((12, 3), (3, 12), (12, 4), (4, 12)))
    earlier, later = (
        LayerHeads(number, v, v, v, o, (0, 1)) for number, (o, v) in enumerate(((o1, v1), (o2, v2)))
    )  # only OV matters for V
    found = composition([earlier, later], ("V",))["V"][2:, :2]
    assert torch.allclose(found, torch.tensor([[0.32612187, 0.25630543], [0.30544469, 0.28288525]]), atol=1e-5)
    values = Factored(o2, v2).eigenvalues()
    expected = torch.tensor([5.2651701 + 2 * 1.9432613, 2 * 2.4212637 - 2.2883804])
    assert torch.allclose(values.sum(-1).real, expected, atol=1e-4)


def test_the_circuit_set_by_hand_shows_in_its_weights() -> None:
    model = induction_lm().model
    layers = head_weights(model)
    k = composition(layers)["K"]
    assert k[2, 1] > 0.17 and k[2, 1] - baseline(96) > 0.07  # 1 / √32 of two matrices of 32 equal singular values
    assert k[2, 0] == k[3].nan_to_num().max() == 0  # the heads that were left empty
    assert copying(layers[1], through(embedding(model), unembedding(model)))[INDUCTION[1]] == pytest.approx(1)
    assert composition_with(layers, PREVIOUS)["K"][1, 0] == k[2, 1]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_its_heads_or_says_why_not(family: str) -> None:
    config = from_dict({"model_type": family, **CONFIGS[family]})
    model = build(config, seed=3).eval()
    if config.kind in ("recurrent", "seq2seq"):
        with pytest.raises(DataError, match="no attention heads"):
            head_weights(model)
        return
    prefixes = ["encoder.", "decoder."] if config.kind == "encoder-decoder" else [""]
    for prefix in prefixes:
        layers = head_weights(model, prefix=prefix, distances=(1, 2))
        stack = stack_of(model, prefix)
        assert [len(layer.q_NHD) for layer in layers] == [stack.config.num_attention_heads] * len(stack.layers)
        scores = composition(layers)["V"]
        assert scores[len(layers[0].q_NHD) :, : len(layers[0].q_NHD)].isfinite().all()
        if config.kind == "vision":
            with pytest.raises(DataError, match="reads no tokens"):
                embedding(model, prefix)
        elif config.kind in ("decoder", "encoder-decoder") and prefix != "encoder.":
            shares = copying(layers[0], through(embedding(model, prefix), unembedding(model, prefix)))
            assert shares.abs().max() <= 1
        else:
            with pytest.raises(DataError, match="no matrix"):
                unembedding(model, prefix)
    if config.kind == "encoder-decoder":
        with pytest.raises(DataError, match="no stack ''"):
            head_weights(model)

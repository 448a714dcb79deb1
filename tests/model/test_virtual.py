"""Virtual tokens: a prompt is the tokens it was copied from; caches, packing, padding, sites, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import bildung
from bildung.core.errors import AdapterError, DataError, OutputError, SettingsError
from bildung.data.batches import Example, pad
from bildung.data.masking import Sentences, pad_sentences
from bildung.model.build import build, make
from bildung.model.config import from_dict
from bildung.model.linear import match_linears, replace_stores
from bildung.model.quantized import Int8, Nf4
from bildung.model.transformer import Decoder
from bildung.model.virtual import (
    Prefix,
    Prompt,
    add_virtual,
    flatten,
    prefix_size,
    read_vectors,
    remove_virtual,
    virtual_of,
)
from bildung.run.loop import decode
from bildung.train.masked import mlm
from bildung.train.objectives import clm
from tests.contract.test_families import CONFIGS
from tests.model.test_linear import with_lora
from tests.model.tiny import tiny_decoder, tiny_lm, tokens
from tests.model.tiny_encoder import tiny_encoder

M, L = 5, 11
FAMILIES = {
    "llama": {},
    "gpt2": {"model_type": "gpt2", "vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma": {"model_type": "gemma3_text", "query_pre_attn_scalar": 64, "sliding_window": 128, "vocab_size": 101},
}


def decoder(family: str) -> Decoder:
    if family == "gpt2":
        return build(from_dict({**FAMILIES[family], "initializer_range": 0.2}), seed=3).eval()
    return tiny_decoder(**FAMILIES[family])


def with_prompt(model: Decoder, kind: str = "prompt") -> Tensor:
    """Puts the vectors (or keys and values) of five tokens before the model; returns these tokens."""
    ids_M = tokens(1, M, seed=9)[0].clamp(max=model.config.vocab_size - 1)
    with torch.no_grad():
        vectors_MD = model.model.vectors(ids_M, torch.float32)
        prefix_MF = flatten(read_vectors(model.model, vectors_MD))
    add_virtual(model, Prompt(vectors_MD) if kind == "prompt" else Prefix(model.config, prefix_MF))
    return ids_M


def read_in_words(model: Decoder, ids_M: Tensor, rows_BL: Tensor) -> Tensor:
    """What the model says when it reads these tokens as tokens."""
    return model(torch.cat((ids_M.expand(len(rows_BL), -1), rows_BL), dim=1))[:, len(ids_M) :]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copied_tokens_are_those_tokens(family: str, kind: str) -> None:
    model = decoder(family)
    ids_M = with_prompt(model, kind)
    there = model(tokens())
    cache = model.kv_cache(2, L)
    cached = torch.cat([model(tokens()[:, :4], kv_cache=cache), model(tokens()[:, 4:], kv_cache=cache)], dim=1)
    remove_virtual(model)
    expected = read_in_words(model, ids_M, tokens())
    torch.testing.assert_close(there, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-5)
    assert (model(tokens()) - expected).abs().max() > 0.1
    assert cache.length == L


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_each_packed_document_reads_the_virtual_tokens(kind: str) -> None:
    model = tiny_decoder()
    with_prompt(model, kind)
    segments_BL = torch.tensor([[0] * 4 + [1] * 7] * 2)
    positions_BL = torch.tensor([[*range(4), *range(7)]] * 2)
    packed = model(tokens(), segments_BL=segments_BL, positions_BL=positions_BL)
    apart = torch.cat([model(tokens()[:, :4]), model(tokens()[:, 4:])], dim=1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_padded_row_answers_as_alone(kind: str) -> None:
    model = tiny_decoder()
    with_prompt(model, kind)
    rows = [tokens(1, 4)[0].tolist(), tokens(1, 9, seed=5)[0].tolist()]
    for use_cache in (True, False):
        together = decode(model, rows, new_tokens=6, use_cache=use_cache)
        alone = [decode(model, [row], new_tokens=6)[0] for row in rows]
        assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
        assert together[0].log_probs == pytest.approx(alone[0].log_probs, abs=1e-4)


def test_a_prefix_read_in_both_directions_sees_the_virtual_tokens() -> None:
    """Cached and whole agree, and differ from reading left to right and from reading without virtual tokens."""
    model = tiny_decoder()
    with_prompt(model)
    prefix_BL = (torch.arange(L) < 4).expand(2, -1)
    whole = model(tokens(), prefix_BL=prefix_BL)
    cache = model.kv_cache(2, L)
    first = model(tokens()[:, :4], prefix_BL=prefix_BL[:, :4], kv_cache=cache)
    cached = torch.cat((first, model(tokens()[:, 4:], kv_cache=cache)), dim=1)
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-5)
    assert (model(tokens()) - whole).abs().max() > 0.05
    remove_virtual(model)
    assert (model(tokens(), prefix_BL=prefix_BL) - whole).abs().max() > 0.05


def test_where_distance_is_counted_in_columns_padding_and_packing_are_refused() -> None:
    model = tiny_decoder(model_type="mistral", sliding_window=6)
    ids_M = with_prompt(model)
    assert model(tokens()).isfinite().all()
    with pytest.raises(DataError, match="pack = False"):
        model(tokens(), segments_BL=torch.zeros(2, L, dtype=torch.long))
    keep_BL = torch.ones(2, L, dtype=torch.bool)
    keep_BL[0, :3] = False
    for cache in (None, model.kv_cache(2, L)):
        with pytest.raises(DataError, match="padded on the left"):
            model(tokens(), keep_BL=keep_BL, kv_cache=cache)
    torch.testing.assert_close(model(tokens(), keep_BL=keep_BL.flip(1))[1], model(tokens())[1])
    there = model(tokens())
    remove_virtual(model)
    torch.testing.assert_close(there, read_in_words(model, ids_M, tokens()), atol=1e-5, rtol=1e-5)


def test_sites_keep_their_shapes_and_see_tokens_only() -> None:
    model = tiny_decoder()
    with_prompt(model)
    seen: list[int] = []
    with (
        bildung.observe(model, ["embed", "layers.*.resid_post", "layers.0.attn.z"]) as found,
        bildung.intervene(model, {"layers.0.resid_post": lambda x: seen.append(x.shape[1])}),
    ):
        model(tokens())
    assert {tuple(x.shape[:2]) for x in found.values()} == {(2, L)} and seen == [L]


def test_the_context_shrinks_and_comes_back() -> None:
    model = tiny_decoder(max_position_embeddings=20)
    assert model(tokens(1, 20)).shape[1] == 20
    with_prompt(model)
    assert model.config.max_position_embeddings == 15
    with pytest.raises(SettingsError, match="context of 15"):
        decode(model, [tokens(1, 12)[0].tolist()], new_tokens=4)
    with_prompt(model, "prefix")  # in place of the others
    assert model.config.max_position_embeddings == 15
    cache = model.kv_cache(1, 8)
    remove_virtual(model)
    assert model.config.max_position_embeddings == 20 and virtual_of(model) is None
    with pytest.raises(SettingsError, match="place for 5 virtual tokens"):
        model(tokens(1, 3), kv_cache=cache)


@pytest.mark.parametrize("many", [20, 21])
def test_more_than_the_context_is_refused(many: int) -> None:
    model = tiny_decoder(max_position_embeddings=20)
    with pytest.raises(SettingsError, match="takes 1 to 19"):
        add_virtual(model, Prompt(torch.zeros(many, 192)))


@pytest.mark.parametrize("store", [Int8, Nf4])
def test_over_quantized_matrices(store: type) -> None:
    model = tiny_decoder()
    replace_stores(model, "all", lambda linear: store.quantize(linear.base.dense()))
    ids_M = with_prompt(model)
    there = model(tokens())
    there.sum().backward()
    assert virtual_of(model).prompt_MD.grad.abs().max() > 0
    remove_virtual(model)
    torch.testing.assert_close(there, read_in_words(model, ids_M, tokens()), atol=1e-2, rtol=1e-2)


def test_kinds_without_a_place_are_refused_by_name() -> None:
    recurrent = build(from_dict({"model_type": "rnn_seq2seq", **CONFIGS["rnn_seq2seq"]}))
    with pytest.raises(AdapterError, match="rnn_seq2seq of kind 'seq2seq'; only language models made of Transformers"):
        add_virtual(recurrent, Prompt(torch.zeros(3, 32)))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_an_encoder_reads_each_row_with_its_virtual_tokens(kind: str) -> None:
    """Written tokens in front are the same thing, as a prompt; padding is nobody's business; packing is refused."""
    model = tiny_encoder("BertForMaskedLM", initializer_range=0.3).model
    rows_BL = tokens(2, L, seed=4).clamp(max=model.config.vocab_size - 1)
    keep_BL = torch.ones(2, L, dtype=torch.bool)
    keep_BL[1, 7:] = False
    ids_M = with_prompt(model, kind)
    there = model(rows_BL, keep_BL=keep_BL)
    assert there.shape[:2] == (2, L)
    torch.testing.assert_close(there[1:, :7], model(rows_BL[1:, :7]), atol=1e-5, rtol=1e-5)
    if kind == "prompt":
        assert model.hidden(rows_BL, with_prompt=True).shape[1] == M + L
        with pytest.raises(DataError, match="pack = False"):
            model(rows_BL, segments_BL=torch.zeros(2, L, dtype=torch.long))
    remove_virtual(model)
    if kind == "prompt":
        torch.testing.assert_close(there[0], read_in_words(model, ids_M, rows_BL)[0], atol=1e-5, rtol=1e-5)
    assert (there - model(rows_BL, keep_BL=keep_BL))[0].abs().max() > 0.05


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    base = bildung.save(tiny_lm(), tmp_path / "base")
    lm = bildung.load(base)
    with_lora(lm.model)
    with_prompt(lm.model)
    with pytest.raises(OutputError, match="holds one type"):
        bildung.save(lm, tmp_path / "both")
    lm = bildung.load(base)
    with_prompt(lm.model)
    with torch.no_grad():
        next(iter(match_linears(lm.model, "q_proj").values())).base.weight[0] += 1
    with pytest.raises(OutputError, match="no longer what"):
        bildung.save(lm, tmp_path / "changed")


LLAMA_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}


def test_counts_of_the_published_benchmark() -> None:
    """Llama-3.2-3B: what peft's result files count as trainable."""
    with torch.device("meta"):
        model = make(from_dict(LLAMA_3B))
        add_virtual(model, Prompt(torch.empty(200, model.config.hidden_size)))
        prompt = sum(p.numel() for p in virtual_of(model).parameters())
        prefixes = [Prefix(model.config, torch.empty(m, prefix_size(model.config))) for m in (200, 50)]
    assert prompt == 614_400
    assert [sum(p.numel() for p in one.parameters()) for one in prefixes] == [11_468_800, 2_867_200]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_padding_may_reach_beyond_a_table_that_virtual_tokens_take_from(kind: str) -> None:
    """27 tokens are left of 32; a full row is padded to 32, which with 5 virtual ones makes 37 positions."""
    words = {"gpt2": "n_embd: 8, n_layer: 1, n_head: 2, n_positions: 32", "bert": "max_position_embeddings: 32"}
    small = "hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8"
    more = words[kind] if kind == "gpt2" else f"{words[kind]}, {small}, architectures: [BertForMaskedLM]"
    model = build(from_dict(yaml.safe_load(f"{{model_type: {kind}, vocab_size: 40, {more}}}")), seed=0).eval()
    add_virtual(model, Prompt(torch.zeros(5, 8)))
    loss: Any = clm
    rows: Any = [Example(list(range(1, 28)), [False] + [True] * 26), Example([3, 4, 5], [False, True, True])]
    padded, exact = (pad(rows, 0, multiple=multiple) for multiple in (8, 27))
    if kind == "bert":
        loss, sentences = mlm, [[Sentences(row.tokens, [0] * len(row.tokens))] for row in rows]
        padded, exact = (pad_sentences(sentences, 0, multiple=multiple) for multiple in (8, 27))
        for batch in (padded, exact):
            batch.chosen_BL[:, 1] = True
    assert padded.tokens_BL.shape == (2, 32) and exact.tokens_BL.shape == (2, 27)
    torch.testing.assert_close(loss(model, padded).total, loss(model, exact).total)

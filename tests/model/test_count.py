"""Parameters and multiply-adds: the exam's terms, other shapes, and agreement with what torch's profiler counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.count import cache_bytes, count, on_paper, totals
from bildung.model.linear import replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import METHODS
from bildung.model.taps import intervene


def layer(n: int, d: int, heads: int = 4, **more: Any) -> dict[str, int]:
    """Multiply-adds of the first layer's parts."""
    config = {"model_type": "bildung", "vocab_size": 32, "hidden_size": d, "num_hidden_layers": 1, **more}
    model = on_paper(from_dict({**config, "num_attention_heads": heads, "gated": more.get("gated", False)}))
    return {part.name.removeprefix("layers.0."): part.multiply_adds for part in count(model, n)}


@pytest.mark.parametrize(("n", "d", "heads"), [(10, 64, 1), (10, 64, 8), (128, 32, 4), (7, 96, 6)])
def test_the_exams_terms(n: int, d: int, heads: int) -> None:
    """Exam row 5: 3 n d² + n d², n² d, n² d, 8 n d²; the same for any number of heads."""
    found = layer(n, d, heads)
    assert found["attn.qkv"] == 3 * n * d**2 and found["attn.out"] == n * d**2
    assert found["attn.scores"] == found["attn.mixing"] == n**2 * d
    assert found["mlp"] == 8 * n * d**2


def test_each_term_grows_as_stated() -> None:
    once, longer, wider = layer(16, 32), layer(32, 32), layer(16, 64)
    for name, with_n, with_d in (
        ("attn.qkv", 2, 4), ("attn.out", 2, 4), ("attn.scores", 4, 2), ("attn.mixing", 4, 2), ("mlp", 2, 4),
    ):  # fmt: skip
        assert longer[name] == with_n * once[name] and wider[name] == with_d * once[name]


def test_grouped_queries_gates_and_windows() -> None:
    plain, other = layer(16, 32), layer(16, 32, num_key_value_heads=1, gated=True, windows=[5])
    assert other["attn.qkv"] == plain["attn.qkv"] // 3 * 1.5 and other["mlp"] == 1.5 * plain["mlp"]
    assert other["attn.scores"] == 16 * 5 * 32


RAW: dict[str, dict[str, Any]] = {
    "gpt2": dict(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=64),
    "llama": dict(
        vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, max_position_embeddings=64,
    ),
    "bert": dict(
        vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        architectures=["BertForPreTraining"],
    ),
    "t5": dict(vocab_size=101, d_model=48, d_kv=10, d_ff=80, num_layers=2, num_heads=3, eos_token_id=1),
    "rnn": dict(vocab_size=101, cell="rnn", hidden_size=48, embedding_size=40, num_hidden_layers=2),
    **{
        f"rnn_seq2seq {attention}": dict(
            vocab_size=101, hidden_size=48, embedding_size=40, encoder_size=20, attention=attention, bos_token_id=1,
            eos_token_id=2, cell="rnn",
        )
        for attention in ("none", "bahdanau", "general", "concat")
    },
    "vit": dict(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, image_size=12, patch_size=4
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", RAW)
def test_against_torchs_own_counter(family: str) -> None:
    """torch counts two per multiply-add, and attention's products only where they are products: the explicit path."""
    model = build(from_dict({"model_type": family.split()[0], **RAW[family]})).eval()
    ids = torch.randint(0, 101, (1, 13))
    inputs = {"t5": (ids[:, :7], ids), "vit": (torch.zeros(1, 3, 12, 12),)}.get(family, (ids,))
    inputs = (ids[:, :7], ids) if "seq2seq" in family else inputs
    # A listener makes attention, and a recurrence, take the path that is written out in products.
    explicit = {site: lambda x: None for site in model.sites if site.endswith(("scores", "state"))}
    with FlopCounterMode(display=False) as counter, torch.no_grad(), intervene(model, explicit):
        h = model.hidden(*inputs) if family == "vit" else model(*inputs)
        if family == "vit":
            model.pooler(h)
        if family == "bert":
            model.next_sentence(model.hidden(ids))
    parts = count(model, 13, 7)
    expected = totals(parts)[1]
    if family == "bert":  # the body ran twice
        expected += sum(part.multiply_adds for part in parts if part.name.startswith("layers."))
    assert counter.get_total_flops() == 2 * expected
    assert totals(parts)[0] == sum(p.numel() for p in model.parameters())


def test_deltas_and_quantized_matrices() -> None:
    raw = {**RAW["llama"], "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = build(from_dict({"model_type": "llama", **raw}))
    before = count(model, 10)
    replace_stores(model, "all", lambda linear: METHODS["nf4"].quantize(linear.base.dense().detach()))
    assert totals(count(model, 10)) == totals(before)
    linear = model.linears()["model.layers.0.mlp.up_proj"]
    linear.deltas["tuned"] = LowRank(64, 128, 2, 1.0)
    part = next(part for part in count(model, 10) if part.name == "layers.0.mlp")
    assert part.delta_parameters == 2 * (64 + 128)
    assert totals(count(model, 10))[1] - totals(before)[1] == 10 * 2 * (64 + 128)


def test_cache_bytes_are_those_of_the_cache() -> None:
    model = build(from_dict({"model_type": "llama", **RAW["llama"]}))
    assert cache_bytes(model.config, 33, 4) == model.kv_cache(1, 33).nbytes

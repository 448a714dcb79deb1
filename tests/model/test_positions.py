"""Every kind of position: its formula, the families that have it, its limits; and what must hold of all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from bildung.core.errors import ConfigError, DataError
from bildung.model.build import build
from bildung.model.config import Rope, from_dict
from bildung.model.positions import (
    AlibiBias,
    RotaryEmbedding,
    alibi_slopes,
    interpolate,
    relative_bucket,
    rope_frequencies,
    sinusoidal,
)
from bildung.model.taps import intervene, observe
from bildung.model.transformer import Decoder
from tests.model.tiny import tokens

KINDS = "integer sinusoidal sinusoidal_halves learned rope alibi t5 none".split()


def model_with(positions: str, **changes: Any) -> Decoder:
    raw = dict(
        model_type="bildung", vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, positions=positions,
    )  # fmt: skip
    return build(from_dict({**raw, **changes}), seed=3).eval()


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# ── what must hold of all kinds ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 4])
def test_cached_equals_uncached(kind: str, window: int | None) -> None:
    model = model_with(kind, windows=[window, None])
    cache = model.kv_cache(2, 11)
    parts = [model(piece, kv_cache=cache) for piece in tokens().split([6, 1, 1, 3], dim=1)]
    close(torch.cat(parts, dim=1), model(tokens()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_explicit_path_equals_the_kernel(kind: str) -> None:
    model = model_with(kind, windows=[4, None])
    with intervene(model, {"*.attn.scores": lambda x: None}):
        explicit = model(tokens())
    close(explicit, model(tokens()))
    assert not torch.equal(explicit, model_with("none", windows=[4, None])(tokens())) or kind == "none"


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_and_packing_change_nothing(kind: str) -> None:
    model, row, pads = model_with(kind), tokens(1), torch.zeros(1, 4, dtype=torch.long)
    keep = torch.tensor([[False] * 4 + [True] * 11])
    positions = (keep.long().cumsum(1) - 1).clamp(min=0)
    close(model(torch.cat((pads, row), 1), keep_BL=keep, positions_BL=positions)[:, 4:], model(row))
    segments = torch.tensor([[0] * 3 + [1] * 8])
    restart = torch.cat((torch.arange(3), torch.arange(8)))[None]
    packed = model(row, segments_BL=segments, positions_BL=restart)
    close(packed, torch.cat((model(row[:, :3]), model(row[:, 3:])), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_only_kinds_that_know_of_order_tell_shuffled_contexts_apart(kind: str) -> None:
    """One layer, the last token's output, the tokens before it in another order. (With two layers even `none` can: what
    a token carries on depends on how many it could see.)"""
    model = model_with(kind, num_hidden_layers=1)
    order = torch.tensor([4, 2, 0, 1, 3, 5])
    row = tokens(1, 6)
    moved = (model(row[:, order])[:, -1] - model(row)[:, -1]).abs().max()
    assert moved < 1e-5 if kind == "none" else moved > 1e-3


# ── added to the embeddings ─────────────────────────────────────────────────────────────────────────────────────────


def test_integer_positions_are_the_number_itself() -> None:
    model = model_with("integer")
    with observe(model, "pos_embed") as seen:
        model(tokens(1, 5))
    assert torch.equal(seen["pos_embed"], torch.arange(5.0)[None, :, None].expand(1, 5, 48))


@pytest.mark.parametrize("size", [8, 7])
def test_sinusoidal_in_both_orders(size: int) -> None:
    positions = torch.tensor([[0, 1, 17, 400]])
    interleaved, halves = sinusoidal(positions, size), sinusoidal(positions, size, halves=True)
    for row, position in enumerate(positions[0].tolist()):
        for i in range(size):
            angle = position / 10000 ** (2 * (i // 2) / size)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert abs(interleaved[0, row, i].item() - expected) < 1e-4
            place = i // 2 + (i % 2) * math.ceil(size / 2)
            assert halves[0, row, place].item() == interleaved[0, row, i].item()


def test_a_learned_table_ends_and_can_be_stretched() -> None:
    model = model_with("learned", max_position_embeddings=10)
    with pytest.raises(DataError, match=r"position 10 is beyond the table of 10 positions.*`bildung tune stretch`"):
        model(tokens())
    table = model.model.embed_positions.weight.detach()
    longer = interpolate(table, 19)
    assert longer.shape == (19, 48)
    close(longer[::2], table)
    close(longer[1], (table[0] + table[1]) / 2)
    close(interpolate(longer, 10), table)


# ── rotation ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ntk_leaves_the_fastest_pair_and_divides_the_slowest() -> None:
    plain, stretched = rope_frequencies(Rope(), 64), rope_frequencies(Rope(kind="ntk", factor=4.0), 64)
    ratio = plain / stretched
    assert ratio[0].item() == 1.0 and abs(ratio[-1].item() - 4.0) < 1e-3
    assert (ratio.diff() > 0).all()
    for pair in range(32):
        base = 10000.0 * 4.0 ** (64 / 62)
        assert abs(stretched[pair].item() / base ** (-2 * pair / 64) - 1) < 1e-5


def test_linear_scaling_reads_positions_as_fractions() -> None:
    plain, stretched = (RotaryEmbedding(rope, 16) for rope in (Rope(), Rope(kind="linear", factor=4.0)))
    close(stretched(torch.tensor([[20]]), torch.float32)[0], plain(torch.tensor([[5]]), torch.float32)[0])


def test_dynamic_scaling_starts_beyond_the_trained_context() -> None:
    rope = Rope(kind="dynamic", factor=2.0, original_max_position_embeddings=16)
    plain, dynamic = RotaryEmbedding(Rope(), 16), RotaryEmbedding(rope, 16)
    within, beyond = torch.arange(16)[None], torch.arange(32)[None]
    assert torch.equal(dynamic(within, torch.float32)[0], plain(within, torch.float32)[0])
    assert (dynamic(beyond, torch.float32)[0] - plain(beyond, torch.float32)[0]).abs().max() > 0.1
    assert torch.equal(dynamic(within, torch.float32)[0], plain(within, torch.float32)[0])  # and comes back


def test_a_part_of_a_head_is_rotated() -> None:
    model = model_with("rope", rotary_dim=4)
    with observe(model, "layers.0.attn.[qk]"):
        assert model.model.rotary(torch.arange(3)[None], torch.float32)[0].shape[-1] == 4


@pytest.mark.parametrize("changes", [{"rotary_dim": 3}, {"head_dim": 7}, {"rotary_dim": 10}])
def test_an_odd_or_too_large_rotary_dimension_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"RoPE would turn \d+ of the head_dim"):
        model_with("rope", **changes)


# ── biases on the scores ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16])
def test_alibi_equals_blooms(heads: int) -> None:
    """Bloom adds slope · key position, which differs by a constant per query, and the softmax does not see that."""
    theirs = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).view(heads, 1, 9)
    if heads in (2, 8, 16):
        assert torch.equal(alibi_slopes(heads), torch.tensor([2 ** (-8 / heads * (i + 1)) for i in range(heads)]))
    close(alibi_slopes(heads), theirs[:, 0, 1], atol=1e-7)
    config = from_dict(
        dict(model_type="bildung", vocab_size=9, hidden_size=4 * heads, num_hidden_layers=1, num_attention_heads=heads)
    )
    columns = torch.arange(9)[None]
    ours = AlibiBias(config)(columns, columns)[0]
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    close(
        ours.masked_fill(future, -1e9).softmax(-1), (theirs + torch.zeros(9, 1)).masked_fill(future, -1e9).softmax(-1)
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (16, 1000)])
def test_t5_buckets_are_transformers(causal: bool, buckets: int, far: int) -> None:
    relative = torch.arange(-1500, 1501)
    theirs = T5Attention._relative_position_bucket(relative, not causal, buckets, far)
    ours = relative_bucket(relative, buckets, far, causal)
    assert torch.equal(ours, theirs) and ours.max() < buckets

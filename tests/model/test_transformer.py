"""What must not change a decoder's numbers: a cache, padding, packing, a shift of positions, the future."""

from __future__ import annotations

import pytest
import torch

from bildung.core.errors import DataError, SettingsError
from bildung.model.build import build
from bildung.model.transformer import Decoder
from tests.model.tiny import tiny_decoder, tokens

VARIANTS = {
    "full": {},
    "window": {"model_type": "mistral", "sliding_window": 4},
    "qk_norm": {"model_type": "qwen3"},
    "mqa": {"num_key_value_heads": 1},
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return tiny_decoder(**VARIANTS[request.param])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("pieces", [(11,), (1,) * 11, (6, 1, 1, 3)])
def test_cached_equals_uncached(model: Decoder, pieces: tuple[int, ...]) -> None:
    cache = model.kv_cache(batch_size=2, max_length=11)
    parts = [model(piece, kv_cache=cache) for piece in tokens().split(list(pieces), dim=1)]
    close(torch.cat(parts, dim=1), model(tokens()))
    assert cache.length == 11
    with pytest.raises(SettingsError, match="holds 11 tokens and 12 are needed"):
        model(tokens()[:, :1], kv_cache=cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(model: Decoder, side: str) -> None:
    row, pads = tokens(batch=1), torch.zeros(1, 4, dtype=torch.long)
    keep = torch.ones(1, 15, dtype=torch.bool)
    if side == "left":
        padded, real = torch.cat((pads, row), 1), slice(4, None)
        keep[:, :4] = False
    else:
        padded, real = torch.cat((row, pads), 1), slice(0, 11)
        keep[:, 11:] = False
    positions = (keep.long().cumsum(1) - 1).clamp(min=0)
    logits = model(padded, keep_BL=keep, positions_BL=positions)
    assert torch.isfinite(logits).all()
    close(logits[:, real], model(row))


def test_left_padded_cache_equals_unpadded(model: Decoder) -> None:
    row, pads = tokens(batch=1), torch.zeros(1, 4, dtype=torch.long)
    keep = torch.tensor([[False] * 4 + [True] * 6])
    positions = (keep.long().cumsum(1) - 1).clamp(min=0)
    cache = model.kv_cache(1, 15)
    first = model(torch.cat((pads, row[:, :6]), 1), keep_BL=keep, positions_BL=positions, kv_cache=cache)
    rest = [model(row[:, i : i + 1], positions_BL=torch.tensor([[i]]), kv_cache=cache) for i in range(6, 11)]
    close(torch.cat((first[:, 4:], *rest), 1), model(row))


def test_packed_equals_unpacked(model: Decoder) -> None:
    documents = [tokens(1, n, seed=n) for n in (3, 7, 1)]
    segments = torch.tensor([[0] * 3 + [1] * 7 + [2]])
    positions = torch.cat([torch.arange(n) for n in (3, 7, 1)])[None]
    packed = model(torch.cat(documents, 1), segments_BL=segments, positions_BL=positions)
    close(packed, torch.cat([model(document) for document in documents], 1))
    # Without segments the second document sees the first: the test would notice.
    leaking = model(torch.cat(documents, 1), positions_BL=positions)
    assert (leaking - packed).abs().max() > 0.1


def test_the_future_is_invisible_and_the_window_ends(model: Decoder) -> None:
    changed = tokens(1).clone()
    changed[0, 8] = 99
    assert torch.equal(model(changed)[:, :8], model(tokens(1))[:, :8])
    assert not torch.equal(model(changed)[:, 8], model(tokens(1))[:, 8])
    one_layer = tiny_decoder(model_type="mistral", sliding_window=4, num_hidden_layers=1)
    start = tokens(1).clone()
    start[0, 2] = 99
    difference = (one_layer(start) - one_layer(tokens(1))).abs().amax(-1)[0]
    assert difference[2:6].min() > 1e-3 and difference[6:].max() < 1e-5


def test_only_differences_of_positions_matter(model: Decoder) -> None:
    """RoPE (exam row 19): shifting every position by k changes nothing."""
    positions = torch.arange(11)[None]
    close(model(tokens(), positions_BL=positions + 37), model(tokens(), positions_BL=positions))
    assert (model(tokens(), positions_BL=2 * positions) - model(tokens())).abs().max() > 1e-2


def test_bfloat16_activations_over_float32_weights() -> None:
    model = tiny_decoder()
    exact = model(tokens())
    model.compute_dtype = torch.bfloat16
    rounded = model(tokens())
    assert rounded.dtype == torch.bfloat16 and model.model.norm.weight.dtype == torch.float32
    assert 0 < (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()
    rounded.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_cache_bytes() -> None:
    """Exam row 13: 2 (K and V) · layers · K heads · length · head_dim · bytes, per row of the batch."""
    assert tiny_decoder().kv_cache(3, 40).nbytes == 3 * 2 * 2 * 2 * 40 * 64 * 4


def test_build_is_reproducible_and_initialised_as_stated() -> None:
    first, again, other = tiny_decoder(), tiny_decoder(), build(tiny_decoder().config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    weight = first.model.layers[0].mlp.up_proj.base.weight
    assert abs(weight.std().item() - 0.1) < 0.01 and not torch.equal(
        weight, other.model.layers[0].mlp.up_proj.base.weight
    )
    assert (first.model.norm.weight == 1).all()


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 2)]
)
def test_wrong_token_shapes_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(DataError, match="shape"):
        tiny_decoder()(bad)


def test_rounding_the_weights_does_not_round_the_positions() -> None:
    """bfloat16 cannot hold RoPE's frequencies: at position 100 the angles would be off by tenths."""
    model = tiny_decoder()
    exact = model.model.rotary(torch.tensor([[100]]), torch.float32)
    rounded = model.to(torch.bfloat16).model.rotary(torch.tensor([[100]]), torch.float32)
    assert torch.equal(exact[0], rounded[0]) and torch.equal(exact[1], rounded[1])


@pytest.mark.parametrize("wrong", [101, -1, 5000])
def test_ids_without_a_row_are_named(wrong: int) -> None:
    with pytest.raises(DataError, match=f"id {wrong} was given; this table has 101 rows, so ids run from 0 to 100"):
        tiny_decoder()(torch.tensor([[5, 6, wrong]]))

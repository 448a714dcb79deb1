"""Shifted sparse attention: groups and half-groups as drawn, nothing of the future, full attention outside training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.shifted_attention import shifted, shifted_attention
from bildung.model.taps import observe


def kernel(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal)


def drawn(q: Tensor, k: Tensor, v: Tensor, group: int) -> Tensor:
    """The picture in the docstring as a mask per head."""
    N, L = q.shape[1:3]
    k, v = (t.repeat_interleave(N // t.shape[1], dim=1) for t in (k, v))
    allowed = torch.zeros(N, L, L, dtype=torch.bool)
    for head in range(N):
        shift = 0 if head < N // 2 or group == L else group // 2
        for at in range(L):
            for other in range(at + 1):
                allowed[head, at, other] = (at + shift) // group == (other + shift) // group
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None])


def qkv(heads: int = 4, kv_heads: int = 4, length: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, heads, length, 8), *(torch.randn(2, kv_heads, length, 8) for _ in "kv")  # type: ignore[return-value]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("group", [2, 6, 12, 24])
def test_it_is_the_drawn_mask(kv_heads: int, group: int) -> None:
    q, k, v = qkv(kv_heads=kv_heads)
    z = shifted_attention(q, k, v, None, group, kernel)
    torch.testing.assert_close(z, drawn(q, k, v, group))
    causal = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(shifted_attention(q, k, v, causal, group, kernel), z)


def test_packed_documents_stay_apart() -> None:
    q, k, v = qkv()
    segments = torch.tensor([0] * 9 + [1] * 15)
    allowed = (torch.ones(24, 24, dtype=torch.bool).tril() & (segments[:, None] == segments))[None, None]
    z = shifted_attention(q, k, v, allowed, 12, kernel)
    changed = [t.clone() for t in (q, k, v)]
    for t in changed[1:]:
        t[:, :, :9] += 1
    torch.testing.assert_close(shifted_attention(changed[0], *changed[1:], allowed, 12, kernel)[:, :, 9:], z[:, :, 9:])


CONFIG: dict[str, Any] = dict(
    model_type="llama", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip


def test_the_last_token_changes_nothing_before_it() -> None:
    """As the authors' plain form does (positions 0 to half a group see it)."""
    model = build(from_dict(CONFIG), 0).train()
    tokens = torch.randint(0, 40, (1, 32))
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 40
    with shifted(model, 1 / 4):
        assert torch.equal(model(tokens)[:, :-1], model(other)[:, :-1])


def test_training_is_shifted_and_inference_is_not() -> None:
    model = build(from_dict(CONFIG), 0)
    tokens = torch.randint(0, 40, (1, 32))
    full = model.eval()(tokens)
    with shifted(model, 1 / 4):
        assert torch.equal(model.eval()(tokens), full)
        sparse = model.train()(tokens)
        torch.testing.assert_close(sparse[:, :4], full[:, :4])
        assert (sparse[:, 8:] - full[:, 8:]).abs().max() > 1e-2
    torch.testing.assert_close(model.train()(tokens), full)
    with shifted(model, 1.0):  # one group is the whole row
        torch.testing.assert_close(model.train()(tokens), full)


def test_bad_shapes_are_refused_by_their_numbers() -> None:
    model = build(from_dict(CONFIG), 0).train()
    for length, heads, group in ((24, 4, 5), (24, 4, 10), (24, 1, 6)):
        with pytest.raises(SettingsError, match=f"rows of {length}, groups of {group} and {heads} heads"):
            shifted_attention(*qkv(heads, 1, length), None, group, kernel)
    with pytest.raises(SettingsError, match=r"\(0, 1\]"), shifted(model, 0.0):
        pass
    asked = observe(model, "layers.0.attn.probs")
    with pytest.raises(SettingsError, match="scores nobody asks for"), shifted(model, 0.25), asked:
        model(torch.randint(0, 40, (1, 32)))

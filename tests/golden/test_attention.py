"""Exam rows 4 and 19: the variance of a dot product, and RoPE's dependence on position differences only."""

from __future__ import annotations

import math

import torch

from bildung.model.config import Rope
from bildung.model.positions import RotaryEmbedding, rotate
from bildung.model.taps import intervene, observe
from tests.model.tiny import tiny_decoder, tokens


def test_row_4_scores_of_unit_variance_queries_and_keys_have_unit_variance() -> None:
    """q, k ~ N(0, 1): Var(q·k) = d_k and Var(q·k / sqrt d_k) = 1; the scores are the model's own, 10^5 of them."""
    model = tiny_decoder(num_hidden_layers=1, max_position_embeddings=256)
    generator = torch.Generator().manual_seed(0)

    def normal(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator)

    with intervene(model, {"*.attn.[qk]": normal}), observe(model, "layers.0.attn.scores") as seen:
        model(tokens(batch=1, length=200))
    scores = seen["layers.0.attn.scores"]
    draws = scores[torch.isfinite(scores)]
    n, d_k = draws.numel(), model.config.head_dim
    assert n > 10**5
    # Keys are shared by queries, so draws are not independent: 200 keys x 2 heads bound the error, not n.
    standard_error = math.sqrt(2 / (200 * 2 * d_k)) * 3
    assert abs(draws.var().item() - 1) < 3 * standard_error
    assert abs((draws * math.sqrt(d_k)).var().item() / d_k - 1) < 3 * standard_error


def test_row_19_rotated_scores_depend_on_the_difference_only() -> None:
    rotary = RotaryEmbedding(Rope(), 64)
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        turned = [rotate(x, *rotary(torch.tensor([[p]]), torch.float32)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert abs(score(7, 3) - score(107, 103)) < 1e-5 * 64
    assert abs(score(7, 3) - score(7, 4)) > 1e-2
    assert abs(score(5, 5) - (q * k).sum().item()) < 1e-4
    # A rotation keeps lengths.
    turned = rotate(q, *rotary(torch.tensor([[11]]), torch.float32))
    torch.testing.assert_close(turned.norm(), q.norm())

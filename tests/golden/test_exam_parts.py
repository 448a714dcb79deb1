"""Exam rows 4, 18, 21 and 22: scaled scores, ALiBi, sinusoidal positions, SiLU and the norms, through whole models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.layers import activation
from bildung.model.taps import intervene, observe
from bildung.model.transformer import Decoder

TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def model_with(**changes: Any) -> Decoder:
    raw = dict(model_type="bildung", vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    return build(from_dict({**raw, **changes})).eval()


def test_row_4_on_independent_draws() -> None:
    """Var(q·k / sqrt d_k) = 1 and Var(q·k) = d_k, on 120,000 independent pairs, within three standard errors."""
    d_k, n = 8, 120_000
    generator = torch.Generator().manual_seed(4)

    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    model = model_with(positions="none")
    with intervene(model, {"*.attn.[qk]": drawn}), observe(model, "*.scores") as seen, torch.no_grad():
        model(torch.zeros(n // 4, 1, dtype=torch.long))  # rows of one token: every score has its own q and k
    scores = seen["layers.0.attn.scores"].double().flatten()
    assert len(scores) == n
    # The variance of a sample variance: (kurtosis - 1) / n; a product of d_k pairs has kurtosis 3 + 6 / d_k.
    error = math.sqrt((2 + 6 / d_k) / n)
    assert abs(scores.var().item() - 1) < 3 * error
    assert abs((scores * math.sqrt(d_k)).var().item() - d_k) < 3 * error * d_k


def test_row_18_alibi_is_a_linear_bias_per_head_and_nothing_on_the_embeddings() -> None:
    with_bias, without = model_with(positions="alibi"), model_with(positions="none")
    names = ["embed", "layers.0.resid_pre", "layers.0.attn.scores"]
    with observe(with_bias, names) as biased, observe(without, names) as plain:
        with_bias(TOKENS), without(TOKENS)
    assert "pos_embed" not in with_bias.sites
    assert torch.equal(biased["embed"], plain["embed"])
    assert torch.equal(biased["layers.0.resid_pre"], biased["embed"])
    added = biased["layers.0.attn.scores"] - plain["layers.0.attn.scores"]
    for head, slope in enumerate((1 / 4, 1 / 16, 1 / 64, 1 / 256)):  # 2^(-8 (h + 1) / 4)
        for i in range(12):
            for j in range(i + 1):
                assert abs(added[0, head, i, j].item() + slope * (i - j)) < 1e-5


def test_row_21_sinusoidal_positions() -> None:
    model = model_with(positions="sinusoidal")
    with observe(model, ["embed", "pos_embed", "layers.0.resid_pre"]) as seen:
        model(TOKENS)
    for position in range(12):
        for i in range(16):
            angle = position / 10000 ** (2 * i / 32)
            assert abs(seen["pos_embed"][0, position, 2 * i].item() - math.sin(angle)) < 1e-5
            assert abs(seen["pos_embed"][0, position, 2 * i + 1].item() - math.cos(angle)) < 1e-5
    assert torch.equal(seen["layers.0.resid_pre"], seen["embed"] + seen["pos_embed"])


def test_row_22_silu() -> None:
    for x in (-3.0, -0.5, 0.0, 1.0, 4.0):
        assert abs(activation("silu")(torch.tensor(x)).item() - x / (1 + math.exp(-x))) < 1e-6


def test_row_22_another_row_of_the_batch_changes_only_batch_norm() -> None:
    other = TOKENS.clone()
    other[1] = (other[1] + 7) % 50
    for norm in ("layer", "rms", "batch"):
        model = model_with(norm=norm).train()
        changed = not torch.equal(model(TOKENS)[0], model(other)[0])
        assert changed == (norm == "batch")
        # In evaluation running averages stand in, and rows are independent again.
        assert torch.equal(model.eval()(TOKENS)[0], model(other)[0])


def test_row_22_layer_norm_is_per_token_and_batch_norm_per_feature() -> None:
    for norm, dimension in (("layer", -1), ("batch", (0, 1))):
        model = model_with(norm=norm, norm_eps=1e-12).train()
        with observe(model, "norm") as seen:
            model(TOKENS)
        torch.testing.assert_close(
            seen["norm"].mean(dimension), torch.zeros_like(seen["norm"].mean(dimension)), atol=1e-5, rtol=0
        )
        spread = seen["norm"].var(dimension, unbiased=False)
        torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-3, rtol=0)

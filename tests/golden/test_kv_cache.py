"""Exam rows 13 and 17: what a KV cache saves and costs, and what a low temperature does."""

from __future__ import annotations

import pytest
import torch

from bildung.model.taps import intervene
from bildung.run.decode import temperature
from bildung.run.loop import decode
from tests.model.tiny import CONFIG, tiny_decoder


def generate_counting(new_tokens: int, use_cache: bool) -> tuple[list[int], int, int]:
    """The tokens, the scores computed per head and layer, and the positions projected, from a prompt of one token."""
    model = tiny_decoder()
    counts = {"scores": 0, "positions": 0}

    def count_scores(scores_BNLS: torch.Tensor) -> None:
        counts["scores"] += scores_BNLS.shape[2] * scores_BNLS.shape[3]

    def count_positions(q_BLNH: torch.Tensor) -> None:
        counts["positions"] += q_BLNH.shape[1]

    with intervene(model, {"layers.0.attn.scores": count_scores, "layers.0.attn.q": count_positions}):
        (answer,) = decode(model, [[5]], new_tokens=new_tokens, use_cache=use_cache)
    return answer.tokens, counts["scores"], counts["positions"]


def test_row_13_the_cache_changes_the_cost_and_not_the_tokens() -> None:
    for T in (5, 10, 20):
        cached, cached_scores, cached_positions = generate_counting(T, use_cache=True)
        plain, plain_scores, plain_positions = generate_counting(T, use_cache=False)
        assert cached == plain
        assert cached_scores == sum(t for t in range(1, T + 1))  # ~ T²
        assert plain_scores == sum(t * t for t in range(1, T + 1))  # ~ T³
        assert (cached_positions, plain_positions) == (T, T * (T + 1) // 2)  # projections, feed-forward: T and T²


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_13_bytes_of_the_cache(dtype: torch.dtype) -> None:
    """2 · L · H_kv · (m + T) · d_k · bytes: 2 for keys and values, and only the key-value heads."""
    model = tiny_decoder().to(dtype)
    m, T = 11, 20
    L, heads, size = CONFIG["num_hidden_layers"], CONFIG["num_key_value_heads"], CONFIG["head_dim"]
    assert model.kv_cache(1, m + T).nbytes == 2 * L * heads * (m + T) * size * dtype.itemsize
    assert model.kv_cache(3, m + T).nbytes == 3 * model.kv_cache(1, m + T).nbytes


def test_row_17_a_low_temperature_sharpens() -> None:
    with torch.no_grad():
        logits_BV = tiny_decoder()(torch.tensor([[5, 17, 42]]))[:, -1]

    def entropy(T: float) -> float:
        log_probs = temperature(T)(logits_BV, [[]]).log_softmax(-1)
        return -(log_probs.exp() * log_probs).nansum().item()

    entropies = [entropy(T) for T in (0.1, 0.3, 0.7, 1.0, 1.5, 3.0)]
    assert entropies == sorted(entropies)
    assert entropies[0] < 0.5 * entropies[3]
    assert torch.equal(temperature(0.1)(logits_BV, [[]]).argmax(-1), logits_BV.argmax(-1))

"""A tiny decoder and batches of random tokens, a function of their number."""

from __future__ import annotations

import pytest
import torch

from bildung.data.batches import Batch, Example, pad
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import match_linears
from bildung.model.low_rank import LowRank
from bildung.model.transformer import Decoder

CONFIG = dict(
    model_type="llama",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    initializer_range=0.2,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


@pytest.fixture
def make_model():
    """make_model(tied=False) -> Decoder with the same weights at every call."""

    def make(tied: bool = False) -> Decoder:
        return build(from_dict({**CONFIG, "tie_word_embeddings": tied}), seed=1)

    return make


@pytest.fixture
def make_lora(make_model):
    """make_lora(dropout=0.0) -> Decoder of which only low-rank deltas train."""

    def make(dropout: float = 0.0) -> Decoder:
        model = make_model().requires_grad_(False)
        generator = torch.Generator().manual_seed(5)
        for linear in match_linears(model, "all").values():
            delta = LowRank(linear.in_features, linear.out_features, 2, 1.0, dropout, generator=generator)
            linear.deltas["default"] = delta
        return model

    return make


@pytest.fixture
def batch_at():
    """batch_at(n, rows=4) -> Batch n of random examples of unequal length, half of their tokens targets."""

    def make(n: int, rows: int = 4) -> Batch:
        generator = torch.Generator().manual_seed(n)
        examples = []
        for row in range(rows):
            tokens = torch.randint(0, 61, (6 + 3 * row,), generator=generator).tolist()
            examples.append(Example(tokens, [False, False] + [bool(i % 2) for i in range(len(tokens) - 2)]))
        return pad(examples, pad_id=0)

    return make

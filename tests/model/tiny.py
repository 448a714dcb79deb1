"""A small decoder whose every dimension has another size, for tests of the model code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bildung.model.config import from_dict
from bildung.model.transformer import Decoder, build

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_decoder(**changes: Any) -> Decoder:
    """Random float32 weights, always the same."""
    return build(from_dict({**CONFIG, **changes}), seed=3).eval()


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    """Token ids of shape (batch, length)."""
    return torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(seed))

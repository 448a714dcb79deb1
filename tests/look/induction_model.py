"""A two-layer attention-only model with an induction circuit set by hand: every number is known.

stream      token | position | token before        one-hot vectors, 32 of each
layer 0     head 1 looks one position back and writes the token that it finds to "token before"
layer 1     head 0 looks for the places whose "token before" is its own token, and writes the token it finds there
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bildung.model.block import Block
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from tests.model.tiny import tiny_lm

SIZE = 32
TOKEN, PLACE, BEFORE = 0, 1, 2
PREVIOUS, INDUCTION = (0, 1), (1, 0)


def induction_lm(**changes: Any) -> LanguageModel:
    """The model, over tokens 0 ... 31 of a byte-level tokenizer; contexts of 32 tokens."""
    raw = {
        "model_type": "bildung",
        "vocab_size": SIZE,
        "hidden_size": 3 * SIZE,
        "head_dim": SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "positions": "learned",
        "max_position_embeddings": SIZE,
        "mlp": False,
    }
    model = build(from_dict({**raw, **changes})).eval()
    with torch.no_grad():
        for linear in model.linears().values():
            cast(Any, linear.base).weight.zero_()
        one = torch.eye(SIZE)
        cast(Any, model).model.embed_tokens.weight.copy_(_in(TOKEN, one))
        cast(Any, model).model.embed_positions.weight.copy_(_in(PLACE, one))
        cast(Any, model).lm_head.base.weight.copy_(_in(TOKEN, one))
        # A query at position p meets the key of position p - 1.
        _set(
            model, PREVIOUS, q=_in(PLACE, 20 * one), k=_in(PLACE, one.roll(1, 0)), v=_in(TOKEN, one), o=_in(BEFORE, one)
        )
        _set(model, INDUCTION, q=_in(TOKEN, 20 * one), k=_in(BEFORE, one), v=_in(TOKEN, one), o=_in(TOKEN, 10 * one))
    return LanguageModel(model, tiny_lm().tokenizer, model.config)


def _in(part: int, matrix: Tensor) -> Tensor:
    """Rows that live in one part of the stream."""
    whole = torch.zeros(len(matrix), 3 * SIZE)
    whole[:, part * SIZE : (part + 1) * SIZE] = matrix
    return whole


def _set(model: Any, where: tuple[int, int], *, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    layer, head = where
    block: Block = model.model.layers[layer]
    rows = slice(head * SIZE, (head + 1) * SIZE)
    for name, matrix in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
        cast(Any, getattr(block.self_attn, name).base).weight[rows] = matrix
    cast(Any, block.self_attn.o_proj.base).weight[:, rows] = o.T

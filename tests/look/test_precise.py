"""What a model computes is looked at as numbers, or not at all."""

from __future__ import annotations

import pytest
import torch

from bildung.core.errors import DataError
from bildung.look.attention_heads.head_scores import head_scores, repeated_tokens
from bildung.look.causal.patching import patching_grid
from bildung.look.causal.prompt_pairs import Pair, Pairs
from bildung.look.lenses.lens import logit_lens
from bildung.look.probing.activations import Read, collect
from tests.model.tiny import tiny_lm


def test_a_model_that_overflows_gives_no_numbers() -> None:
    """A probe of nan would have the accuracy of always saying one class, a rank among them would be 1."""
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.linears()["model.layers.1.mlp.down_proj"].base.weight[0, 0] = float("inf")
    pairs = Pairs((Pair((5, 6, 7), (5, 8, 7), (9,), (10,)),))
    for look in (
        lambda: logit_lens(lm, [5, 6, 7]),
        lambda: patching_grid(lm.model, pairs, site="attn.z", across="head"),
        lambda: collect(lm, [Read([5, 6, 7], [[1]])], ["layers.1.resid_post"]),
        lambda: head_scores(lm, repeated_tokens(lm, stretch=4, rows=1)),
    ):
        with pytest.raises(DataError, match=r"no numbers \(nan or inf\)"):
            look()
    assert collect(lm, [Read([5, 6, 7], [[1]])], ["layers.0.resid_post"])["layers.0.resid_post"].isfinite().all()

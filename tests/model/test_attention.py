"""Masks, sinks, soft-caps: against the formulas of the families that have them, and by who can see whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from bildung.model.attention import make_mask
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.taps import intervene, observe
from bildung.model.transformer import Decoder
from tests.model.tiny import tokens


def model_with(**changes: Any) -> Decoder:
    raw = dict(
        model_type="bildung", vocab_size=101, hidden_size=48, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, initializer_range=0.4, positions="none",
    )  # fmt: skip
    return build(from_dict({**raw, **changes}), seed=3).eval()


def against(peer: Any, model: Decoder, **settings: Any) -> None:
    """The model's z and probabilities equal what a peer's attention makes of its q, k and v."""
    attention = model.model.layers[0].self_attn
    with observe(model, "layers.0.attn.*") as seen:
        model(tokens())
    q, k, v = (seen[f"layers.0.attn.{word}"].transpose(1, 2) for word in "qkv")
    future = torch.full((11, 11), float("-inf")).triu(1)
    module = SimpleNamespace(num_key_value_groups=3, training=False, head_dim=8, sinks=attention.sinks_N)
    z, probs = peer(module, q, k, v, future, scaling=8**-0.5, **settings)
    torch.testing.assert_close(seen["layers.0.attn.probs"], probs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen["layers.0.attn.z"], z, atol=1e-5, rtol=1e-5)


def test_sinks_are_those_of_gpt_oss() -> None:
    model = model_with(attention_sinks=True)
    model.model.layers[0].self_attn.sinks_N.data = torch.linspace(-2, 3, 6)
    against(gpt_oss_attention, model)
    with observe(model, "*.probs") as seen:
        model(tokens())
    assert (seen["layers.0.attn.probs"].sum(-1) < 0.99).any()  # what the sink takes is missing


def test_the_soft_cap_is_that_of_gemma_2() -> None:
    model = model_with(attention_softcap=1.5)
    against(gemma2_attention, model, softcap=1.5)
    with observe(model, "*.scores") as seen:
        model(tokens())
    scores = seen["layers.0.attn.scores"]
    assert scores[torch.isfinite(scores)].abs().max() <= 1.5
    with pytest.raises(AssertionError):
        against(gemma2_attention, model, softcap=3.0)


def test_logits_are_capped() -> None:
    logits = model_with()(tokens())
    torch.testing.assert_close(model_with(logit_softcap=2.0)(tokens()), 2 * torch.tanh(logits / 2))


def seen_by(model: Decoder, **inputs: Any) -> Tensor:
    """[i, j]: whether position i gives probability to position j (in any head)."""
    with observe(model, "layers.0.attn.probs") as seen:
        model(tokens(1), **inputs)
    return seen["layers.0.attn.probs"][0].amax(0) > 0


ROW, COLUMN = torch.arange(11)[:, None], torch.arange(11)[None]
SEGMENTS = torch.tensor([[0] * 4 + [1] * 7])
PREFIX = torch.tensor([[True] * 5 + [False] * 6])
KEEP = torch.tensor([[False] * 2 + [True] * 9])
MASKS: dict[str, tuple[dict[str, Any], dict[str, Any], Tensor]] = {
    "causal": ({}, {}, COLUMN <= ROW),
    "bidirectional": ({"causal": False}, {}, (ROW >= 0) & (COLUMN >= 0)),
    "sliding": ({"windows": [3]}, {}, (COLUMN <= ROW) & (COLUMN > ROW - 3)),
    "packed": ({}, {"segments_BL": SEGMENTS}, (COLUMN <= ROW) & (SEGMENTS[0][:, None] == SEGMENTS[0])),
    "packed, bidirectional": ({"causal": False}, {"segments_BL": SEGMENTS}, SEGMENTS[0][:, None] == SEGMENTS[0]),
    "prefix": ({}, {"prefix_BL": PREFIX}, (COLUMN <= ROW) | PREFIX[0]),
    "padding": ({}, {"keep_BL": KEEP}, ((COLUMN <= ROW) & KEEP[0]) | (ROW == COLUMN)),
    "sliding, padding": (
        {"windows": [3]},
        {"keep_BL": KEEP},
        ((COLUMN <= ROW) & (COLUMN > ROW - 3) & KEEP[0]) | (ROW == COLUMN),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_who_can_see_whom(name: str) -> None:
    changes, inputs, expected = MASKS[name]
    assert torch.equal(seen_by(model_with(**changes), **inputs), expected)


@pytest.mark.parametrize("positions", ["none", "alibi", "t5", "rope"])
@pytest.mark.parametrize("name", MASKS)
def test_the_explicit_path_equals_the_kernel(name: str, positions: str) -> None:
    changes, inputs, _ = MASKS[name]
    model = model_with(**changes, positions=positions)
    with intervene(model, {"*.scores": lambda x: None}):
        explicit = model(tokens(1), **inputs)
    torch.testing.assert_close(model(tokens(1), **inputs), explicit, atol=2e-5, rtol=1e-5)


def test_a_prefix_lm_reads_its_prefix_both_ways_and_answers_causally() -> None:
    model = model_with(num_hidden_layers=2, positions="rope")
    changed = tokens(1).clone()
    changed[0, 4] = 99
    within = (model(changed, prefix_BL=PREFIX) - model(tokens(1), prefix_BL=PREFIX)).abs().amax(-1)[0]
    assert (within > 1e-4).all()
    changed = tokens(1).clone()
    changed[0, 8] = 99
    after = (model(changed, prefix_BL=PREFIX) - model(tokens(1), prefix_BL=PREFIX)).abs().amax(-1)[0]
    assert after[:8].max() == 0 and after[8:].min() > 1e-4


def test_masks_are_made_only_where_needed() -> None:
    """The kernels are fastest without one: a plain causal prompt, one new token, an encoder without padding."""
    cpu = torch.device("cpu")
    assert make_mask(5, 0, None, None, None, cpu).allowed_B1LS is None
    assert make_mask(1, 9, None, None, None, cpu).allowed_B1LS is None
    assert make_mask(5, 0, 8, None, None, cpu).causal
    assert make_mask(5, 0, None, None, None, cpu, causal=False) == make_mask(1, 0, None, None, None, cpu)
    assert make_mask(2, 3, None, None, None, cpu).allowed_B1LS is not None

"""Exam row 33: H x W x C -> N = HW/P² patches of P²C numbers, linear to D, class token, positions (N + 1) x D."""

from __future__ import annotations

import pytest
import torch

import bildung
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import state_tensors
from bildung.model.vit import patches_of


@pytest.mark.parametrize(("H", "W", "C", "P", "D"), [(224, 224, 3, 16, 768), (28, 42, 1, 7, 24), (12, 8, 2, 4, 6)])
def test_sizes(H: int, W: int, C: int, P: int, D: int) -> None:
    keys = dict(model_type="vit", image_size=[H, W], num_channels=C, patch_size=P, hidden_size=D, intermediate_size=8)
    model = build(from_dict({**keys, "num_hidden_layers": 1, "num_attention_heads": 2})).eval()
    N = H * W // P**2
    with bildung.observe(model, ["embed", "pos_embed", "layers.0.resid_pre"]) as seen:
        model.hidden(torch.randn(1, C, H, W))
    assert patches_of(torch.randn(1, C, H, W), model.config.image).shape == (1, N, P * P * C)
    assert seen["embed"].shape == (1, N, D)
    assert seen["pos_embed"].shape == (1, N + 1, D)
    assert seen["layers.0.resid_pre"].shape == (1, N + 1, D)
    assert state_tensors(model)["embeddings.position_embeddings"].shape == (1, N + 1, D)
    if H == 224:
        assert (N, P * P * C) == (196, 768)  # 14 x 14 patches, 197 tokens

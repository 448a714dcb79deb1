"""Attention patterns: they are the model's own, and a difference is found in the head that was changed."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bildung
from bildung.core.errors import DataError
from bildung.look import attention as operation
from bildung.look.attention_heads.attention_patterns import (
    AttentionPatterns,
    attention_patterns,
    moved,
    pattern_difference,
)
from tests.model.tiny import tiny_lm

TEXT = "one two one"


def unpacked(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8)


def test_patterns_are_causal_distributions_that_do_not_change_the_model():
    lm = tiny_lm()
    tokens_BL = torch.tensor([lm.tokenizer.encode(TEXT)])
    before = lm.model(tokens_BL)
    seen = attention_patterns(lm, TEXT)
    assert seen.probs_NHLS.shape == (2, 6, len(seen.tokens), len(seen.tokens))
    assert torch.allclose(seen.probs_NHLS.sum(-1), torch.ones(()))
    assert seen.probs_NHLS.triu(1).eq(0).all()
    assert torch.equal(lm.model(tokens_BL), before)
    with pytest.raises(DataError, match="1 to 3"):
        attention_patterns(lm, TEXT, max_tokens=3)


def test_scores_name_the_known_heads():
    L = 5
    previous = torch.eye(L).roll(1, 0)
    previous[0] = torch.eye(L)[0]
    first = torch.eye(L)[[0] * L]
    same = torch.eye(L)
    spread = torch.ones(L, L).tril() / torch.arange(1, L + 1)[:, None]
    seen = AttentionPatterns([0] * L, [""] * L, torch.stack([previous, first, same, spread])[None])
    scores = {name: row[0].tolist() for name, row in seen.scores().items()}
    assert scores["previous token"][0] == scores["first token"][1] == scores["same token"][2] == 1
    assert max(range(4), key=lambda head: scores["entropy"][head]) == 3
    assert max(scores["entropy"][:3]) == pytest.approx(0)


def test_difference_is_in_the_changed_head():
    a, b = tiny_lm(), tiny_lm()
    with torch.no_grad():
        b.model.linears()["model.layers.1.self_attn.q_proj"].base.weight[2 * 64 : 3 * 64] *= -3  # head 2
    one, other = pattern_difference(a, b, TEXT)
    share = moved(one, other)
    assert share[1, 2] > 0.05
    share[1, 2] = 0
    assert share.abs().max() == 0


def test_operation_leaves_page_picture_and_patterns(tmp_path: Path):
    bildung.save(tiny_lm(), tmp_path / "base")
    other = tiny_lm()
    with torch.no_grad():
        other.model.linears()["model.layers.0.self_attn.k_proj"].base.weight.mul_(2)
    bildung.save(other, tmp_path / "tuned")
    settings = operation.Settings(prompt="<script>alert(1)</script> & more", against=tmp_path / "tuned")
    record = operation.attention(tmp_path / "base", tmp_path / "out", settings)
    page = (tmp_path / "out/attention.html").read_text()
    assert "<script>alert(1)" not in page and "https://" not in page
    patterns = load_file(tmp_path / "out/patterns.safetensors")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))
    sent = unpacked(re.search(r'id="b-7">(.*?)</script>', page).group(1))  # layer 1, head 1 of 6
    assert torch.allclose(sent.reshape(patterns["b"].shape[2:]) / 255, patterns["b"][1, 1], atol=0.5 / 255 + 1e-6)
    assert page.count('type="text/plain"') == 24 and data["causal"]
    difference = unpacked(data["thumbs"]["difference"]).view(torch.int8).reshape(patterns["a"].shape) / 127
    expected = patterns["b"] - patterns["a"]
    assert torch.allclose(difference * data["widest"], expected, atol=expected.abs().max() / 127)
    assert (tmp_path / "out/attention.png").read_bytes()[:4] == b"\x89PNG"
    assert "highest moved" in record.measured and not torch.equal(patterns["a"], patterns["b"])

"""Logits equal transformers' on random configs of every decoder family, and mutants of the model do not.

The configs have a different size for every dimension and `initializer_range` 0.2: at the usual 0.02 a model without
RoPE would pass a loose tolerance.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bildung.model import attention, layers, transformer
from bildung.model.config import from_dict
from bildung.model.store import assemble, state_tensors

SHAPE: dict[str, Any] = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    initializer_range=0.2,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-rope-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "llama-rope-llama3": ("Llama", dict(rope_parameters=LLAMA3_ROPE)),
    # 23 tokens: beyond the 16 that these were trained on
    "llama-rope-yarn": ("Llama", dict(rope_parameters=dict(YARN, rope_theta=10000.0))),
    "llama-rope-yarn-settings": (
        "Llama",
        dict(rope_parameters=dict(YARN, rope_theta=500.0, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3)),
    ),
    "llama-rope-dynamic": (
        "Llama",
        dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0), max_position_embeddings=16),
    ),
    "llama-mqa": ("Llama", dict(num_key_value_heads=1)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral-window": ("Mistral", dict(sliding_window=5)),
    "qwen2": ("Qwen2", dict(head_dim=8)),
    "qwen2-window": ("Qwen2", dict(head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", {}),
    "qwen3-bias-window": (
        "Qwen3",
        dict(attention_bias=True, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    ),
}


def peer_and_ours(name: str) -> tuple[Any, transformer.Decoder]:
    family, changes = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for key, parameter in peer.named_parameters():
        if "norm" in key or key.endswith("bias"):  # transformers leaves ones and zeros, which would hide a swap
            nn.init.normal_(parameter, 1.0, 0.3)
    raw = json.loads(config.to_json_string())
    tensors = {k: v.clone() for k, v in peer.state_dict().items()}
    return peer, assemble(from_dict(raw), tensors)


def worst(peer: Any, ours: transformer.Decoder) -> float:
    tokens = torch.randint(0, 101, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((peer(input_ids=tokens).logits - ours(tokens)).abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str) -> None:
    peer, ours = peer_and_ours(name)
    assert worst(peer, ours) < 1e-5
    assert set(state_tensors(ours)) <= set(peer.state_dict())


def no_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x


def interleaved_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]
    return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)


def wrong_eps(self: layers.RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * self.weight


def wrong_activation(self: layers.MLP, x: Tensor) -> Tensor:
    return self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))


def swapped_groups(module: attention.Attention) -> None:
    """Query head n reads key-value head n % K instead of n // group."""
    K = module.k_proj.out_features // module.head_dim
    weight = module.q_proj.base.weight
    weight.data = weight.data.view(K, module.group, module.head_dim, -1).transpose(0, 1).reshape(weight.shape)


@pytest.mark.parametrize("mutant", ["no_rope", "interleaved_rope", "wrong_eps", "wrong_activation", "swapped_groups"])
def test_mutants_fail(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, ours = peer_and_ours("llama")
    if mutant == "no_rope":
        monkeypatch.setattr(attention, "rotate", no_rope)
    elif mutant == "interleaved_rope":
        monkeypatch.setattr(attention, "rotate", interleaved_rope)
    elif mutant == "wrong_eps":
        monkeypatch.setattr(layers.RMSNorm, "forward", wrong_eps)
    elif mutant == "wrong_activation":
        monkeypatch.setattr(layers.MLP, "forward", wrong_activation)
    else:
        for block in ours.model.layers:
            swapped_groups(block.self_attn)
    assert worst(peer, ours) > 1e-3


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("mistral-window", "windows"),
        ("llama-rope-llama3", "rope"),
        ("llama-rope-yarn", "rope"),
        ("llama-rope-dynamic", "rope"),
    ],
)
def test_config_mutants_fail(name: str, attribute: str) -> None:
    peer, ours = peer_and_ours(name)
    plain = from_dict({"model_type": "llama", **SHAPE})
    object.__setattr__(ours.config, attribute, getattr(plain, attribute))
    if attribute == "rope":
        ours.model.rotary = transformer.RotaryEmbedding(plain.rope, plain.head_dim)
    assert worst(peer, ours) > 1e-3

"""Attention (Vaswani et al. 2017, eq. 1), grouped-query (Ainslie et al. 2023), and the attention-kernel seam.

    MHA: N query heads, N key-value heads      GQA: N query heads share K < N      MQA: K = 1

    q0 q1 q2 q3        q0 q1 q2 q3                   q0 q1 q2 q3
    |  |  |  |          \\/    \\/                      \\  \\/  /
    k0 k1 k2 k3         k0    k1                        k0

PyTorch's scaled-dot-product kernels do the work. Only a layer whose `scores` or `probs` somebody listens to takes the
explicit path, which spells out the formula; the two agree to rounding.
"""

# B batch, L query length, S key length, D model, N heads, K key-value heads, G heads per key-value head, H head dim

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.model.config import ModelConfig
from bildung.model.kv_cache import KVCache
from bildung.model.layers import RMSNorm
from bildung.model.linear import dense_linear, project
from bildung.model.positions import rotate
from bildung.model.taps import Taps


@dataclass(frozen=True)
class Mask:
    """Who may look at whom. `allowed` None means all pairs, or plain causality when `causal`."""

    allowed_B1LS: Tensor | None
    causal: bool


def make_mask(
    length: int,
    past: int,
    window: int | None,
    keep_BS: Tensor | None,
    segments_BL: Tensor | None,
    device: torch.device,
) -> Mask:
    """The mask of `length` queries that follow `past` cached tokens.

    keep_BS: True = a real token; padding is never looked at. segments_BL: only tokens of the same packed document see
    each other. window: a query sees itself and the window - 1 tokens before it. Every query may look at itself, padding
    too: a row without any allowed key would be 0/0 and its NaN would spread through the values of the next layer.
    """
    total = past + length
    slides = window is not None and window < total
    if keep_BS is None and segments_BL is None and not slides:
        if length == 1:
            return Mask(None, causal=False)
        if past == 0:
            return Mask(None, causal=True)
    query_L1 = torch.arange(past, total, device=device)[:, None]
    key_S = torch.arange(total, device=device)
    allowed = key_S <= query_L1
    if slides and window is not None:
        allowed = allowed & (key_S > query_L1 - window)
    allowed = allowed[None]
    if keep_BS is not None:
        allowed = allowed & keep_BS[:, None, :total]
    if segments_BL is not None:
        allowed = allowed & (segments_BL[:, :, None] == segments_BL[:, None, :])
    return Mask((allowed | (key_S == query_L1))[:, None], causal=False)


class Attention(nn.Module):
    """Multi-head attention of one layer. q, k and v stay separate matrices, so adapters and circuits see them."""

    def __init__(self, config: ModelConfig, taps: Taps, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        size, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        inner_kv = config.num_key_value_heads * config.head_dim
        path = f"model.layers.{layer}.self_attn"
        self.q_proj = dense_linear(size, inner, bias=config.qkv_bias, name=f"{path}.q_proj")
        self.k_proj = dense_linear(size, inner_kv, bias=config.qkv_bias, name=f"{path}.k_proj")
        self.v_proj = dense_linear(size, inner_kv, bias=config.qkv_bias, name=f"{path}.v_proj")
        self.o_proj = dense_linear(inner, size, bias=config.o_bias, name=f"{path}.o_proj")
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.taps = taps
        # Names are built once: formatting a string costs four times the idle tap.
        self.q_site, self.k_site, self.v_site, self.scores_site, self.probs_site, self.z_site, self.out_site = (
            f"layers.{layer}.attn.{word}" for word in ("q", "k", "v", "scores", "probs", "z", "out")
        )

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Mask, kv_cache: KVCache | None) -> Tensor:
        B, L, _ = x_BLD.shape
        projected = project(x_BLD, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (one.view(B, L, -1, self.head_dim) for one in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.taps(self.q_site, q), self.taps(self.k_site, k), self.taps(self.v_site, v)
        q_BNLH, k_BKSH, v_BKSH = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if kv_cache is not None:
            k_BKSH, v_BKSH = kv_cache.update(self.layer, k_BKSH, v_BKSH)
        if self.taps.wanted(self.scores_site, self.probs_site):
            z_BNLH = self._explicit(q_BNLH, k_BKSH, v_BKSH, mask)
        else:
            z_BNLH = self._kernel(q_BNLH, k_BKSH, v_BKSH, mask)
        z_BLNH = self.taps(self.z_site, z_BNLH.transpose(1, 2))
        return self.taps(self.out_site, self.o_proj(z_BLNH.reshape(B, L, -1)))

    def _kernel(self, q_BNLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask) -> Tensor:
        """The same by PyTorch's kernel."""
        if q_BNLH.shape[2] == 1 and self.group > 1:
            # One query per head, a decoding step: the query heads of a group enter as the queries of one head, and
            # each key is read once for all of them (CPU, bfloat16, 160 keys: 20 µs instead of 115).
            B, N, _, H = q_BNLH.shape
            q_BKGH = q_BNLH.reshape(B, N // self.group, self.group, H)
            z_BKGH = F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=mask.allowed_B1LS)
            return z_BKGH.reshape(B, N, 1, H)
        return F.scaled_dot_product_attention(
            q_BNLH, k_BKSH, v_BKSH, attn_mask=mask.allowed_B1LS, is_causal=mask.causal, enable_gqa=self.group > 1
        )

    def _explicit(self, q_BNLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask) -> Tensor:
        """softmax(q k^T / sqrt(H) + mask) v, with the scores and probabilities in the open (shape B N L S)."""
        k_BNSH = k_BKSH.repeat_interleave(self.group, dim=1)
        v_BNSH = v_BKSH.repeat_interleave(self.group, dim=1)
        scores = q_BNLH @ k_BNSH.transpose(-1, -2) * self.head_dim**-0.5
        allowed = mask.allowed_B1LS
        if mask.causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        scores = self.taps(self.scores_site, scores)
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        return self.taps(self.probs_site, probs) @ v_BNSH

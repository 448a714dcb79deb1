"""Attention (Vaswani et al. 2017, eq. 1), grouped-query (Ainslie et al. 2023), and the attention-kernel seam.

    MHA: N query heads, N key-value heads      GQA: N query heads share K < N      MQA: K = 1

    q0 q1 q2 q3        q0 q1 q2 q3                   q0 q1 q2 q3
    |  |  |  |          \\/    \\/                      \\  \\/  /
    k0 k1 k2 k3         k0    k1                        k0

Who may look at whom is the mask's business: causal, bidirectional, prefix, sliding window, packed documents, padding.
PyTorch's scaled-dot-product kernels do the work. Only a layer whose `scores` or `probs` somebody listens to, or whose
formula no kernel knows (soft-cap, sinks), takes the explicit path, which spells it out; the two agree to rounding.
"""

# B batch, L query length, S key length, D model, N heads, K key-value heads, G heads per key-value head, H head dim

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.model.attention_blocks import QUERIES, Blocks, attend, blocks_of
from bildung.model.base import can_look
from bildung.model.config import ModelConfig
from bildung.model.kv_cache import KVCache
from bildung.model.layers import norm_from
from bildung.model.linear import dense_linear, project
from bildung.model.positions import rotate
from bildung.model.shifted_attention import shifted_attention
from bildung.model.taps import Taps

Rotation = tuple[Tensor, Tensor]  # cosines and sines


@dataclass(frozen=True)
class Mask:
    """Who may look at whom, and what is added to the scores. `allowed` None: all pairs; if `causal`, those before."""

    allowed_B1LS: Tensor | None
    causal: bool
    bias_BNLS: Tensor | None = None
    blocks: Blocks | None = None  # how attention on a CPU goes through it (attention_blocks.py)

    def cut(self, x_BLD: Tensor, total: int) -> Mask:
        """This mask with its blocks, for queries of all of `x` and `total` keys, where blocks are worth it."""
        rows, length, _ = x_BLD.shape
        if x_BLD.device.type != "cpu" or length < QUERIES or self.bias_BNLS is not None:
            return self
        if torch.compiler.is_compiling() or (self.allowed_B1LS is not None and not can_look(self.allowed_B1LS)):
            return self
        return replace(self, blocks=blocks_of(self.allowed_B1LS, self.causal, rows, length, total))

    def allowed(self, scores_BNLS: Tensor) -> Tensor | None:
        """`allowed_B1LS`, or causality spelt out."""
        if not self.causal:
            return self.allowed_B1LS
        return torch.ones(scores_BNLS.shape[-2:], dtype=torch.bool, device=scores_BNLS.device).tril()

    def with_bias(self, bias_BNLS: Tensor | None) -> Mask:
        """This mask with something added to the scores it lets through."""
        if bias_BNLS is None:
            return self
        allowed = self.allowed(bias_BNLS)
        if allowed is not None:
            bias_BNLS = bias_BNLS.masked_fill(~allowed, float("-inf"))
        return Mask(allowed, causal=False, bias_BNLS=bias_BNLS)


def make_mask(
    length: int,
    past: int,
    window: int | None,
    keep_BS: Tensor | None,
    segments_BL: Tensor | None,
    device: torch.device,
    *,
    causal: bool = True,
    prefix_BS: Tensor | None = None,
) -> Mask:
    """The mask of `length` queries that follow `past` cached tokens.

    keep_BS: True = a real token; padding is never looked at. segments_BL: only tokens of the same packed document see
    each other. window: a query sees itself and the window - 1 tokens before it. prefix_BS: True = a token that all see,
    those before it too (prefix-LM). Every query may look at itself, padding too: a row without any allowed key would be
    0/0 and its NaN would spread through the values of the next layer.
    """
    total = past + length
    slides = window is not None and window < total
    if keep_BS is None and segments_BL is None and not slides and prefix_BS is None:
        if length == 1 or not causal:
            return Mask(None, causal=False)
        if past == 0:
            return Mask(None, causal=True)
    query_L1 = torch.arange(past, total, device=device)[:, None]
    key_S = torch.arange(total, device=device)
    allowed = (key_S <= query_L1) if causal else torch.ones(length, total, dtype=torch.bool, device=device)
    if slides and window is not None:
        allowed = allowed & (key_S > query_L1 - window)
    allowed = allowed[None]
    if prefix_BS is not None:
        allowed = allowed | prefix_BS[:, None, :total]
    if keep_BS is not None:
        allowed = allowed & keep_BS[:, None, :total]
    if segments_BL is not None:
        same = segments_BL[:, :, None] == segments_BL[:, None, :]
        allowed = allowed & F.pad(same, (past, 0), value=True)  # what was read before all documents is everyone's
    return Mask((allowed | (key_S == query_L1))[:, None], causal=False)


class Attention(nn.Module):
    """Multi-head attention of one layer. q, k and v stay separate matrices, so adapters and circuits see them."""

    def __init__(self, config: ModelConfig, taps: Taps, site: str, layer: int, memory_size: int | None = None):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        size, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        read, inner_kv = memory_size or size, config.num_key_value_heads * config.head_dim
        self.q_proj = dense_linear(size, inner, bias=config.qkv_bias)
        self.k_proj = dense_linear(read, inner_kv, bias=config.qkv_bias)
        self.v_proj = dense_linear(read, inner_kv, bias=config.qkv_bias)
        self.o_proj = dense_linear(inner, size, bias=config.o_bias)
        self.q_norm = norm_from(config, config.head_dim) if config.qk_norm else None
        self.k_norm = norm_from(config, config.head_dim) if config.qk_norm else None
        self.sinks_N = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sinks else None
        self.softcap, self.dropout = config.attention_softcap, config.attention_dropout
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.shifted_share: float | None = None  # groups of this share of a row, in training (shifted_attention.py)
        self.taps = taps
        # Names are built once: formatting a string costs four times the idle tap.
        self.q_site, self.k_site, self.v_site, self.scores_site, self.probs_site, self.z_site, self.out_site = (
            f"{site}.{word}" for word in ("q", "k", "v", "scores", "probs", "z", "out")
        )
        self.result_site = f"{site}.result"

    def forward(self, x_BLD: Tensor, rotation: Rotation | None, mask: Mask, kv_cache: KVCache | None) -> Tensor:
        B, L, _ = x_BLD.shape
        projected = project(x_BLD, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (one.view(B, L, -1, self.head_dim) for one in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.taps(self.q_site, q), self.taps(self.k_site, k), self.taps(self.v_site, v)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q_BNLH, k_BKSH, v_BKSH = (t.transpose(1, 2) for t in (q, k, v))
        if kv_cache is not None:
            k_BKSH, v_BKSH = kv_cache.update(self.layer, k_BKSH, v_BKSH)
        return self._attend(q_BNLH, k_BKSH, v_BKSH, mask)

    def _attend(self, q_BNLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask) -> Tensor:
        B, _, L, _ = q_BNLH.shape
        unusual = self.softcap is not None or self.sinks_N is not None
        explicit = unusual or self.taps.wanted(self.scores_site, self.probs_site)
        if self.shifted_share is not None and self.training:
            z_BNLH = self._shifted(q_BNLH, k_BKSH, v_BKSH, mask, explicit)
        elif explicit:
            z_BNLH = self._explicit(q_BNLH, k_BKSH, v_BKSH, mask)
        else:
            z_BNLH = self._kernel(q_BNLH, k_BKSH, v_BKSH, mask)
        z_BLNH = self.taps(self.z_site, z_BNLH.transpose(1, 2))
        out_BLD: Tensor = self.o_proj(z_BLNH.reshape(B, L, -1))
        if self.taps.wanted(self.result_site):
            # What each head adds is worked out for who asks. Only what he changed of it is added to the sum, so that
            # looking, and changing nothing, leave the numbers as they are.
            result_BLND = self.results(z_BLNH)
            changed_BLND = self.taps(self.result_site, result_BLND)
            if changed_BLND is not result_BLND:
                out_BLD = out_BLD + (changed_BLND - result_BLND).sum(dim=2)
            if changed_BLND.requires_grad and not (self.training and self.o_proj.deltas):
                # The same numbers; their gradient comes by way of the heads, so that it is known there. (While deltas
                # train it is not: their dropout is in the matrix's own output alone.)
                bias_D = self.o_proj.effective(z_BLNH.dtype)[1]
                total_BLD = changed_BLND.sum(dim=2) + (0 if bias_D is None else bias_D)
                out_BLD = out_BLD.detach() + (total_BLD - total_BLD.detach())
        return self.taps(self.out_site, out_BLD)

    def results(self, z_BLNH: Tensor) -> Tensor:
        """What each head adds to the output, B L N D: its rows of z through its columns of W_O, without the bias."""
        weight_DNH = self.o_proj.weight().to(z_BLNH.dtype).unflatten(1, z_BLNH.shape[-2:])
        return torch.einsum("blnh,dnh->blnd", z_BLNH, weight_DNH)

    def _kernel(self, q_BNLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask) -> Tensor:
        """The same by PyTorch's kernel."""
        dropout = self.dropout if self.training else 0.0
        if q_BNLH.shape[2] == 1 and self.group > 1 and mask.bias_BNLS is None:
            # One query per head, a decoding step: the query heads of a group enter as the queries of one head, and
            # each key is read once for all of them (CPU, bfloat16, 160 keys: 20 µs instead of 115).
            B, N, _, H = q_BNLH.shape
            q_BKGH = q_BNLH.reshape(B, N // self.group, self.group, H)
            z_BKGH = F.scaled_dot_product_attention(
                q_BKGH, k_BKSH, v_BKSH, attn_mask=mask.allowed_B1LS, dropout_p=dropout, scale=self.scale
            )
            return z_BKGH.reshape(B, N, 1, H)
        if mask.blocks is not None:
            return attend(q_BNLH, k_BKSH, v_BKSH, self.scale, mask.blocks, dropout)
        allowed = mask.allowed_B1LS if mask.bias_BNLS is None else mask.bias_BNLS.to(q_BNLH.dtype)
        return F.scaled_dot_product_attention(
            q_BNLH,
            k_BKSH,
            v_BKSH,
            attn_mask=allowed,
            dropout_p=dropout,
            is_causal=mask.causal,
            scale=self.scale,
            enable_gqa=self.group > 1,
        )

    def _shifted(self, q_BNLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, explicit: bool) -> Tensor:
        if explicit or mask.bias_BNLS is not None or not (mask.causal or mask.allowed_B1LS is not None):
            raise SettingsError(
                "shifted attention is for causal models whose scores nobody asks for and nothing is added to "
                "(no soft-cap, sink, ALiBi or relative bias)."
            )
        group = round(q_BNLH.shape[2] * (self.shifted_share or 1))
        return shifted_attention(
            q_BNLH,
            k_BKSH,
            v_BKSH,
            mask.allowed_B1LS,
            group,
            lambda q, k, v, allowed, causal: self._kernel(q, k, v, Mask(allowed, causal)),
        )

    def _explicit(self, q_BNLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask) -> Tensor:
        """softmax(q k^T · scale + bias, masked) v, with the scores and probabilities in the open (shape B N L S)."""
        k_BNSH = k_BKSH.repeat_interleave(self.group, dim=1)
        v_BNSH = v_BKSH.repeat_interleave(self.group, dim=1)
        scores = q_BNLH @ k_BNSH.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask.bias_BNLS is not None:
            scores = scores + mask.bias_BNLS.to(scores.dtype)
        if (allowed := mask.allowed(scores)) is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        scores = self.taps(self.scores_site, scores)
        if self.sinks_N is not None:
            # The sink takes part in the softmax and is then left out: the probabilities add up to less than one.
            sink_BNL1 = self.sinks_N.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            probs = F.softmax(torch.cat((scores, sink_BNL1), dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
        else:
            probs = F.softmax(scores, dim=-1, dtype=torch.float32)
        probs = self.taps(self.probs_site, probs.to(scores.dtype))
        return F.dropout(probs, self.dropout, self.training) @ v_BNSH


@dataclass(frozen=True)
class Memory:
    """An encoder's states, for a decoder to look at."""

    states_BSD: Tensor
    keep_BS: Tensor | None

    @property
    def mask(self) -> Mask:
        """Every query sees every real token of the source."""
        return Mask(None if self.keep_BS is None else self.keep_BS[:, None, None, :], causal=False)


class CrossAttention(Attention):
    """Queries from the decoder, keys and values from the encoder's states (Vaswani et al. 2017, section 3.2.3)."""

    def forward(self, x_BLD: Tensor, memory: Memory, kv_cache: KVCache | None) -> Tensor:  # type: ignore[override]
        B, L, _ = x_BLD.shape
        q_BLNH = self.taps(self.q_site, self.q_proj(x_BLD).view(B, L, -1, self.head_dim))
        if kv_cache is not None and self.layer in kv_cache.cross:
            k_BKSH, v_BKSH = kv_cache.cross[self.layer]  # the source does not change from token to token
        else:
            k, v = (one(memory.states_BSD).unflatten(-1, (-1, self.head_dim)) for one in (self.k_proj, self.v_proj))
            k_BKSH, v_BKSH = self.taps(self.k_site, k).transpose(1, 2), self.taps(self.v_site, v).transpose(1, 2)
            if kv_cache is not None:
                kv_cache.cross[self.layer] = (k_BKSH, v_BKSH)
        return self._attend(q_BLNH.transpose(1, 2), k_BKSH, v_BKSH, memory.mask)

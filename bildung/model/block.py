"""One layer of a Transformer: attention and feed-forward, each added to the residual stream.

Where the norm stands (Xiong et al. 2020, arXiv 2002.04745):

    pre        x + f(norm(x))            Llama, GPT-2: the stream itself is never normalised; trains without warm-up
    post       norm(x + f(x))            the 2017 Transformer, BERT ("Add & Norm")
    sandwich   x + norm(f(norm(x)))      Gemma 2, 3
"""

# B batch, L length, D hidden_size

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.model.attention import Attention, CrossAttention, Mask, Memory, Rotation
from bildung.model.config import ModelConfig
from bildung.model.kv_cache import KVCache
from bildung.model.layers import MLP, norm_from
from bildung.model.recompute import Recompute, again
from bildung.model.taps import Taps


class LayerScale(nn.Module):
    """A learned factor per feature, small at first (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, size: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(size))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD * self.lambda1.to(x_BLD.dtype)


class Block(nn.Module):
    """One layer: attention (to itself, then to a memory if it has one), then feed-forward, each added to the stream.

    `*_layernorm` stands before a sublayer or, post-norm, after its addition; `*_out_layernorm` on what it adds.
    """

    def __init__(self, config: ModelConfig, taps: Taps, prefix: str, layer: int):
        super().__init__()
        site, before = f"{prefix}layers.{layer}", config.norm_placement != "post"
        self.post, self.parallel, self.dropout = not before, config.parallel_residual, config.residual_dropout
        self.recompute: Recompute = "none"  # what is not kept for the backward pass
        self.drop_path = config.drop_path
        self.input_layernorm = norm_from(config)
        self.self_attn = Attention(config, taps, f"{site}.attn", layer)
        if config.cross:
            memory_size = config.encoder.hidden_size if config.encoder else None
            self.cross_layernorm = norm_from(config)
            self.cross_attn = CrossAttention(config, taps, f"{site}.cross", layer, memory_size)
        sandwich = config.norm_placement == "sandwich"
        self.attn_out_layernorm = norm_from(config) if sandwich else None
        self.attn_scale = LayerScale(config.hidden_size) if config.layer_scale is not None else None
        self.attention_only = not config.mlp
        if config.mlp:
            self.post_attention_layernorm = norm_from(config)
            self.mlp = MLP(config, taps, f"{site}.mlp")
            self.mlp_out_layernorm = norm_from(config) if sandwich else None
            self.mlp_scale = LayerScale(config.hidden_size) if config.layer_scale is not None else None
        self.cross = config.cross
        self.taps = taps
        self.pre_site, self.mid_site, self.cross_site, self.post_site = (
            f"{site}.resid_{word}" for word in ("pre", "mid", "cross", "post")
        )

    def forward(
        self,
        x_BLD: Tensor,
        rotation: Rotation | None,
        mask: Mask,
        kv_cache: KVCache | None,
        memory: Memory | None = None,
    ) -> Tensor:
        return self._keeping("blocks", self._through, x_BLD, rotation, mask, kv_cache, memory)

    def _keeping(self, what: Recompute, function: Callable[..., Tensor], *given: Any) -> Tensor:
        """`function(*given)`; of what goes on inside nothing is kept if this is what is to be computed again."""
        if what != self.recompute or not self.training or not torch.is_grad_enabled():
            return function(*given)
        return again(self.taps, function, *given)

    def _through(
        self, x_BLD: Tensor, rotation: Rotation | None, mask: Mask, kv_cache: KVCache | None, memory: Memory | None
    ) -> Tensor:
        x_BLD = self.taps(self.pre_site, x_BLD)
        if self.post:
            x_BLD = self.input_layernorm(
                x_BLD + self._drop(self._keeping("attention", self.self_attn, x_BLD, rotation, mask, kv_cache))
            )
            x_BLD = self.taps(self.mid_site, x_BLD)
            if self.cross:
                x_BLD = self.cross_layernorm(
                    x_BLD + self._drop(self._keeping("attention", self.cross_attn, x_BLD, memory, kv_cache))
                )
                x_BLD = self.taps(self.cross_site, x_BLD)
            if not self.attention_only:
                x_BLD = self.post_attention_layernorm(x_BLD + self._drop(self._keeping("mlp", self.mlp, x_BLD)))
            return self.taps(self.post_site, x_BLD)
        entered_BLD = x_BLD
        normed_BLD = self.input_layernorm(x_BLD)
        added = self._keeping("attention", self.self_attn, normed_BLD, rotation, mask, kv_cache)
        x_BLD = x_BLD + self._drop(self._shape(added, self.attn_out_layernorm, self.attn_scale))
        x_BLD = self.taps(self.mid_site, x_BLD)
        if self.cross:
            normed_BLD = self.cross_layernorm(x_BLD)
            x_BLD = x_BLD + self._drop(self._keeping("attention", self.cross_attn, normed_BLD, memory, kv_cache))
            x_BLD = self.taps(self.cross_site, x_BLD)
        if self.attention_only:
            return self.taps(self.post_site, x_BLD)
        normed_BLD = self.post_attention_layernorm(entered_BLD if self.parallel else x_BLD)
        added = self._keeping("mlp", self.mlp, normed_BLD)
        x_BLD = x_BLD + self._drop(self._shape(added, self.mlp_out_layernorm, self.mlp_scale))
        return self.taps(self.post_site, x_BLD)

    def _shape(self, added_BLD: Tensor, norm: nn.Module | None, scale: LayerScale | None) -> Tensor:
        added_BLD = added_BLD if norm is None else norm(added_BLD)
        return added_BLD if scale is None else scale(added_BLD)

    def _drop(self, added_BLD: Tensor) -> Tensor:
        if self.dropout:
            added_BLD = F.dropout(added_BLD, self.dropout, self.training)
        if self.drop_path and self.training:  # all of what is added, for some of the examples
            kept_B = added_BLD.new_ones(len(added_BLD), 1, 1)
            added_BLD = added_BLD * F.dropout(kept_B, self.drop_path, self.training)
        return added_BLD

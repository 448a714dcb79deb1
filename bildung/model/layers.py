"""The parts of a model that are neither attention nor a weight matrix: embedding, normalisation, gated feed-forward."""

# B batch, L length, D hidden_size, F intermediate_size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.model.config import ModelConfig
from bildung.model.linear import dense_linear, project
from bildung.model.taps import Taps


class Embedding(nn.Module):
    """One vector per token. nn.Embedding would draw random numbers that are overwritten at once (1.3 s of imports)."""

    def __init__(self, vocab_size: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return F.embedding(tokens_BL, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

    Computed in float32 whatever the activations are, as Llama does.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        x = x_BLD.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x.to(x_BLD.dtype) * self.weight.to(x_BLD.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU: Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, taps: Taps, layer: int):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        path = f"model.layers.{layer}.mlp"
        self.gate_proj = dense_linear(size, inner, bias=bias, name=f"{path}.gate_proj")
        self.up_proj = dense_linear(size, inner, bias=bias, name=f"{path}.up_proj")
        self.down_proj = dense_linear(inner, size, bias=bias, name=f"{path}.down_proj")
        self.taps = taps
        self.act_site, self.out_site = f"layers.{layer}.mlp.act", f"layers.{layer}.mlp.out"

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = project(x_BLD, self.gate_proj, self.up_proj)
        act_BLF = F.silu(gate_BLF) * up_BLF
        return self.taps(self.out_site, self.down_proj(self.taps(self.act_site, act_BLF)))

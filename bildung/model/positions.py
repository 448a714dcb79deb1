"""How a model knows where a token stands: rotary position embedding (RoPE).

Su et al. 2021 (arXiv 2104.09864): each pair of query/key dimensions is turned by an angle position * frequency, so a
score depends on the difference of positions only. The pairing is Hugging Face's: dimension i with i + H/2 (the paper
and GGUF files pair 2i with 2i + 1; the two differ by a fixed permutation of the rows of W_Q and W_K).
"""

# B batch, L length, N heads, H head dim

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bildung.model.config import Rope


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Angle per position of each pair, float32 (H/2,).

    `linear` divides all of them by a factor (position interpolation, Chen et al. 2023, arXiv 2306.15595). `llama3`
    (Llama 3.1 model code) divides only the slow ones, whose wavelength exceeds the original context, and blends
    between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequencies
        context = rope.original_max_position_embeddings
        # 0 for wavelengths beyond context / low_freq_factor, 1 for those short of context / high_freq_factor
        keep = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return (1 - keep) * frequencies / rope.factor + keep * frequencies
    return frequencies


class RotaryEmbedding(nn.Module):
    """Positions -> the cosines and sines that turn queries and keys."""

    def __init__(self, rope: Rope, head_dim: int):
        super().__init__()
        # No buffer: it follows from config.json, and model.to(bfloat16) must not round it.
        self.frequencies = rope_frequencies(rope, head_dim)

    def forward(self, positions_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin of shape (B, L, 1, H); angles are computed in float32 (bfloat16 cannot count beyond 256)."""
        if self.frequencies.device != positions_BL.device:
            self.frequencies = self.frequencies.to(positions_BL.device)
        angles_BLh = positions_BL[..., None].float() * self.frequencies
        angles_BLNH = torch.cat((angles_BLh, angles_BLh), dim=-1).unsqueeze(-2)
        return angles_BLNH.cos().to(dtype), angles_BLNH.sin().to(dtype)


def rotate(x_BLNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (x_i, x_{i+H/2}) by its angle."""
    first, second = x_BLNH.chunk(2, dim=-1)
    return x_BLNH * cos + torch.cat((-second, first), dim=-1) * sin

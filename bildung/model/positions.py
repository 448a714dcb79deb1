"""How a model knows where a token stands. Chosen by `config.positions`; all of them are here, to be compared.

added to the embeddings     integer         the position itself, as a number: grows without bound (a bad idea)
                            sinusoidal      fixed waves of many lengths (Vaswani et al. 2017, section 3.5)
                            learned         one vector per position; none beyond the table (GPT-2, BERT, ViT)
turning queries and keys    rope            angle = position · frequency (Su et al. 2021, arXiv 2104.09864)
added to attention scores   alibi           -slope · distance, a slope per head (Press et al. 2022, 2108.12409)
                            t5              a learned number per head and bucket of distances (Raffel et al. 2020)
nowhere                     none            a causal model can still count the tokens it sees (Haviv et al. 2022)
"""

# B batch, L length, S key length, N heads, H head dim, D hidden_size, P positions of a table

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bildung.core.errors import DataError
from bildung.model.base import can_look
from bildung.model.config import ModelConfig, Rope

ADDED = ("integer", "sinusoidal", "sinusoidal_halves", "learned")

# ── added to the embeddings ─────────────────────────────────────────────────────────────────────────────────────────


def padded_beyond(context: int | None, keep_BL: Tensor) -> Tensor | None:
    """Positions BL of rows whose padding, rounded up, reaches beyond the context, counted by real tokens; else None.

    A context that virtual tokens take from (virtual.py) is seldom a multiple of eight.
    """
    if context is None or keep_BL.shape[1] <= context:
        return None
    return (keep_BL.long().cumsum(1) - 1).clamp(min=0)


class AddedPositions(nn.Module):
    """A vector per position, added to the embeddings."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind, self.size = config.positions, config.hidden_size
        self.limit, self.offset = config.max_position_embeddings, config.position_offset
        if self.kind == "learned":
            self.weight = nn.Parameter(torch.empty(self.limit + self.offset, self.size))

    def forward(self, positions_BL: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors BLD (or 1LD). Raises DataError for a position beyond a learned table."""
        if self.kind == "learned":
            if can_look(positions_BL) and int(positions_BL.max()) >= self.limit:
                raise DataError(
                    f"position {int(positions_BL.max())} is beyond the table of {self.limit} positions "
                    f"(max_position_embeddings); shorten the text, or draw the table out with `bildung tune "
                    f"stretch`."
                )
            return F.embedding(positions_BL + self.offset, self.weight).to(dtype)
        if self.kind == "integer":
            return positions_BL[..., None].to(dtype).expand(*positions_BL.shape, self.size)
        return sinusoidal(positions_BL, self.size, halves=self.kind == "sinusoidal_halves").to(dtype)


def sinusoidal(positions_BL: Tensor, size: int, *, halves: bool = False) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/size)), PE(pos, 2i+1) = cos(same), float32 of shape (..., size).

    halves: all sines first, then all cosines, as fairseq, Marian and tensor2tensor order them.
    """
    exponents = torch.arange(0, size, 2, device=positions_BL.device).float() / size
    angles = positions_BL[..., None].float() / 10000.0**exponents
    if halves:
        return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :size]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :size]


def interpolate(table_PD: Tensor, positions: int) -> Tensor:
    """A learned table stretched or shrunk to another number of positions, linearly between neighbours (in float32)."""
    stretched = F.interpolate(table_PD.float().t()[None], size=positions, mode="linear", align_corners=True)
    return stretched[0].t().to(table_PD.dtype)


# ── turning queries and keys ────────────────────────────────────────────────────────────────────────────────────────


def rope_frequencies(rope: Rope, head_dim: int, length: int = 0) -> Tensor:
    """Angle per position of each pair, float32 (H/2,).

    linear   all divided by a factor: position interpolation (Chen et al. 2023, arXiv 2306.15595)
    ntk      a larger base, so that the slowest pair is divided by the factor and the fastest stays (bloc97, 2023)
    dynamic  ntk with a factor that follows from `length` once it exceeds the trained context (transformers' form)
    llama3   only the slow ones are divided, whose wavelength exceeds the original context (Llama 3.1 model code)
    yarn     the same by the number of turns within the original context (Peng et al. 2023, arXiv 2309.00071, eq. 23)
    """
    theta, context = rope.theta, rope.original_max_position_embeddings
    if rope.kind == "ntk":
        theta *= rope.factor ** (head_dim / (head_dim - 2))
    if rope.kind == "dynamic" and length > context:
        theta *= (rope.factor * length / context - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequencies
        # 0 for wavelengths beyond context / low_freq_factor, 1 for those short of context / high_freq_factor
        keep = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return (1 - keep) * frequencies / rope.factor + keep * frequencies
    if rope.kind == "yarn":

        def pair_with(turns: float) -> float:
            """The index of the pair that makes so many turns within the original context."""
            return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        low = max(math.floor(pair_with(rope.beta_fast)), 0)
        high = min(math.ceil(pair_with(rope.beta_slow)), head_dim - 1)
        # Linear over pairs, as in the authors' code and whatever reads such a config; the paper's is linear in turns.
        ramp = (torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)
        keep = 1 - ramp.clamp(0, 1)
        return (1 - keep) * frequencies / rope.factor + keep * frequencies
    return frequencies


def rope_attention_factor(rope: Rope) -> float:
    """What YaRN multiplies cosines and sines by: 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4)."""
    if rope.kind != "yarn":
        return 1.0
    return rope.attention_factor or (0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0)


class RotaryEmbedding(nn.Module):
    """Positions -> the cosines and sines that turn queries and keys.

    Each pair of dimensions is turned by position * frequency, so a score depends on the difference of positions only.
    The pairing is Hugging Face's: dimension i with i + H/2 (the paper and GGUF files pair 2i with 2i + 1; the two
    differ by a fixed permutation of the rows of W_Q and W_K).
    """

    def __init__(self, rope: Rope, head_dim: int):
        super().__init__()
        self.rope, self.head_dim = rope, head_dim
        # No buffer: it follows from config.json, and model.to(bfloat16) must not round it.
        with torch.device("cpu"):
            self.frequencies = rope_frequencies(rope, head_dim)
        self.factor = rope_attention_factor(rope)

    def forward(self, positions_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin of shape (B, L, 1, H); angles are computed in float32 (bfloat16 cannot count beyond 256)."""
        if self.rope.kind == "dynamic" and not isinstance(positions_BL, FakeTensor):
            self.frequencies = rope_frequencies(self.rope, self.head_dim, int(positions_BL.max()) + 1)
        if self.frequencies.device != positions_BL.device:
            self.frequencies = self.frequencies.to(positions_BL.device)
        angles_BLh = positions_BL[..., None].float() * self.frequencies
        angles_BLNH = torch.cat((angles_BLh, angles_BLh), dim=-1).unsqueeze(-2)
        return (angles_BLNH.cos() * self.factor).to(dtype), (angles_BLNH.sin() * self.factor).to(dtype)


def rotate(x_BLNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (x_i, x_{i+R/2}) of the first R dimensions by its angle; the others stay (GPT-NeoX)."""
    rotated = cos.shape[-1]
    if rotated < x_BLNH.shape[-1]:
        return torch.cat((rotate(x_BLNH[..., :rotated], cos, sin), x_BLNH[..., rotated:]), dim=-1)
    first, second = x_BLNH.chunk(2, dim=-1)
    return x_BLNH * cos + torch.cat((-second, first), dim=-1) * sin


# ── added to attention scores ───────────────────────────────────────────────────────────────────────────────────────


def alibi_slopes(heads: int) -> Tensor:
    """One slope per head: 2^(-8/n), 2^(-16/n) ...; for n no power of two, those of the next lower power and every
    second one of the next higher (the authors' code; the paper gives powers of two only)."""
    lower = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    slopes += [2 ** (-4 * (i + 1) / lower) for i in range(0, 2 * (heads - lower), 2)]
    return torch.tensor(slopes)


class AlibiBias(nn.Module):
    """-slope · |query position - key position| on every score."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        with torch.device("cpu"):
            self.slopes_N = alibi_slopes(config.num_attention_heads)

    def forward(self, query_BL: Tensor, key_BS: Tensor) -> Tensor:
        """Bias BNLS in float32."""
        distance_B1LS = (query_BL[:, :, None] - key_BS[:, None, :]).abs()[:, None]
        return -self.slopes_N.to(query_BL.device)[:, None, None] * distance_B1LS


class RelativeBias(nn.Module):
    """T5: a learned number per head and bucket; half of the buckets for exact distances, half growing as log."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_attention_heads))
        self.max_distance, self.causal = config.relative_max_distance, config.causal

    def forward(self, query_BL: Tensor, key_BS: Tensor) -> Tensor:
        """Bias BNLS."""
        relative_BLS = key_BS[:, None, :] - query_BL[:, :, None]
        buckets = relative_bucket(relative_BLS, self.weight.shape[0], self.max_distance, self.causal)
        return F.embedding(buckets, self.weight).permute(0, 3, 1, 2)


def relative_bucket(relative: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """The bucket of key position - query position (arXiv 1910.10683, section 2.1; the authors' rounding).

    causal: keys after the query share bucket 0 (they are masked); else they have the upper half of the buckets.
    """
    offset = torch.zeros_like(relative)
    if not causal:
        buckets //= 2
        offset = (relative > 0).long() * buckets
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    exact = buckets // 2
    # log(0) is never taken: distances below `exact` use the other branch, but both are computed
    scaled = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (scaled * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def bias_from(config: ModelConfig) -> AlibiBias | RelativeBias | None:
    """What the model adds to its attention scores, if anything."""
    if config.positions == "alibi":
        return AlibiBias(config)
    return RelativeBias(config) if config.positions == "t5" else None

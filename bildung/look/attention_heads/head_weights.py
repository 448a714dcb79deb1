"""What every attention head does, read off its weights: where it looks (QK) and what it carries along (OV).

    score(l, s) = x_l^T (W_Q^T W_K) x_s · scale          QK: a form on two vectors of the stream, D x D, rank H
    added to l  = Σ_s p(l, s) (W_O W_V) x_s              OV: a map from the stream to the stream, D x D, rank H

With the embedding E and the unembedding U (both V x D) on their two sides these are forms and maps of tokens: the full
circuits E QK E^T and U OV E^T, V x V (Elhage et al. 2021, *A mathematical framework for transformer circuits*). All of
them are kept as two factors (factored.py); the V x V ones never exist.

What has to be said about real models, which the paper's toy ones are not:

    norms     A head reads norm(x) = w ∘ x / size + b. The weight w (Gemma: 1 + w) is multiplied into W_Q, W_K and W_V,
              and into U for the final norm; LayerNorm's taking away of the mean as well. The same with the norms that
              stand on q and k, or on what a sublayer adds. The division by the size, one number per token, and b are
              left out: they are not linear. This is done on copies; the model stays as it is. Post-norm models read
              the stream as it is.
    RoPE      Queries and keys are turned by their positions, so QK depends on how far apart they are: at distance
              d it is W_Q^T R(d) W_K with R the rotation. `distances` chooses one, or several whose mean is taken: what
              a head prefers wherever it is. At 0, the default, there is no rotation.
    GQA       A group of query heads shares one key-value head: QK and OV of each are those with its group's K and V.
    biases    of q, k, v and o, and positions that are added to embeddings or scores, are left out.
    weights   are what the model computes with: dequantized, with every enabled delta (LoRA, edits) added.
"""

# N heads, K key-value heads, D hidden_size, H head_dim, V vocabulary, R rotated part of H

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bildung.core.errors import DataError
from bildung.look.attention_heads.factored import Factored, positive_share
from bildung.model.block import Block
from bildung.model.layers import BatchNorm, LayerNorm, RMSNorm
from bildung.model.positions import RotaryEmbedding, rotate
from bildung.model.transformer import Backbone, Stack

CHUNK = 8192  # rows of the vocabulary at a time


@dataclass(frozen=True)
class LayerHeads:
    """The matrices of one layer's heads in float32, norms folded in. Of grouped heads, k and v are repeated."""

    layer: int
    q_NHD: Tensor  # times the scale of the scores, turned by the distance
    k_NHD: Tensor
    v_NHD: Tensor
    o_NDH: Tensor
    key_value_head: tuple[int, ...]  # of each head

    @property
    def qk(self) -> Factored:
        """D x D per head: the query's place in the stream down, the key's across."""
        return Factored(self.q_NHD.mT, self.k_NHD)

    @property
    def ov(self) -> Factored:
        """D x D per head: from what stands at the key (across) to what is added at the query (down)."""
        return Factored(self.o_NDH, self.v_NHD)


@torch.no_grad()
def head_weights(model: nn.Module, *, prefix: str = "", distances: Sequence[int] = (0,)) -> list[LayerHeads]:
    """The heads of every layer of a stack, on the model's device.

    prefix: "encoder." or "decoder." of an encoder-decoder. distances: of query to key, for RoPE (0 or more; of models
    without RoPE nothing depends on it). Raises DataError for a model without attention layers, or no such stack.
    """
    stack = stack_of(model, prefix)
    if not distances or min(distances) < 0:
        raise DataError(
            f"distances = {tuple(distances)}; at least one is needed, each 0 or more (a query's to its key)."
        )
    return [_heads(stack, number, tuple(distances)) for number in range(len(stack.layers))]


@torch.no_grad()
def embedding(model: nn.Module, prefix: str = "") -> Tensor:
    """E_VD: what each token puts into the stream, before positions. Raises DataError where nothing reads tokens."""
    stack = stack_of(model, prefix)
    if not isinstance(stack, Backbone):
        raise DataError("this model reads no tokens: its heads have QK and OV, but no circuits of tokens.")
    device = stack.embed_tokens.weight.device
    ids_V = torch.arange(len(stack.embed_tokens.weight), device=device)
    norm = stack.embed_norm or nn.Identity()
    return torch.cat([norm(stack.vectors(some, torch.float32)).float() for some in ids_V.split(CHUNK)])


@torch.no_grad()
def unembedding(model: nn.Module, prefix: str = "") -> Tensor:
    """U_VD, the final norm's weight folded in: what a vector of the stream adds to each logit, up to the norm's size.

    Raises DataError for models whose states do not go through one matrix to tokens.
    """
    config, head, stack = cast(Any, model).config, getattr(model, "lm_head", None), stack_of(model, prefix)
    if head is None or stack.prefix == "encoder." or config.kind == "encoder":
        raise DataError(f"a {config.model_type} of kind {config.kind!r} has no matrix from its stream to tokens.")
    return reading(head.weight().detach().float(), stack.norm) * config.logit_scale


def copying(layer: LayerHeads, through_DD: Tensor) -> Tensor:
    """N: Σ λ / Σ |λ| of the full OV circuit U OV E^T (Elhage et al. 2021): 1 if attending to a token makes that token
    more likely in every direction, -1 if less likely. through_DD: E^T U, once per model (see `through`).

    The eigenvalues are found at W_V (E^T U) W_O, H x H.
    """
    return positive_share(torch.linalg.eigvals((layer.v_NHD @ through_DD @ layer.o_NDH).cpu()))


def matching(layer: LayerHeads, embedding_VD: Tensor) -> Tensor:
    """N: the same share of the full QK circuit E QK E^T: 1 if a head looks for the token that it stands at."""
    gram_DD = embedding_VD.T @ embedding_VD
    return positive_share(torch.linalg.eigvals((layer.k_NHD @ gram_DD @ layer.q_NHD.mT).cpu()))


def through(embedding_VD: Tensor, unembedding_VD: Tensor) -> Tensor:
    """E^T U (D x D), by which the eigenvalues of every head's full OV circuit are found without that circuit."""
    return embedding_VD.T @ unembedding_VD


def stack_of(model: nn.Module, prefix: str = "") -> Stack:
    """The stack of blocks with that prefix; of half an encoder-decoder (asked.py), that half. Raises DataError naming
    those there are."""
    prefix = prefix or getattr(model, "stack", "")
    stacks = {module.prefix: module for module in model.modules() if isinstance(module, Stack)}
    if not stacks:
        raise DataError(f"a {type(model).__name__} has no attention heads in layers; a Transformer has.")
    if prefix not in stacks:
        names = ", ".join(repr(name) for name in stacks)
        raise DataError(f"this model has no stack {prefix!r}; it has {names}. Choose with `prefix`.")
    return stacks[prefix]


# ── folding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def reading(matrix_OD: Tensor, norm: nn.Module | None) -> Tensor:
    """A matrix that is applied to norm(x), as one that is applied to x / size(x)."""
    if norm is None:
        return matrix_OD
    matrix_OD = matrix_OD * _factors(norm)
    return matrix_OD - matrix_OD.mean(-1, keepdim=True) if isinstance(norm, LayerNorm) else matrix_OD


def writing(matrix_OD: Tensor, norm: nn.Module | None) -> Tensor:
    """A matrix whose result y goes through a norm, as one that gives norm(y) · size(y)."""
    if norm is None:
        return matrix_OD
    if isinstance(norm, LayerNorm):
        matrix_OD = matrix_OD - matrix_OD.mean(-2, keepdim=True)
    return matrix_OD * _factors(norm)[:, None]


def _factors(norm: nn.Module) -> Tensor:
    if isinstance(norm, RMSNorm):
        return norm.weight.detach().float() + norm.offset
    if isinstance(norm, BatchNorm):  # in evaluation it is linear: all of it can be folded but the shift
        return norm.weight.detach().float() * torch.rsqrt(norm.running_var.detach().float() + norm.eps)
    return cast(Tensor, norm.weight).detach().float()


def _heads(stack: Stack, number: int, distances: tuple[int, ...]) -> LayerHeads:
    block = cast(Block, stack.layers[number])
    attention, config = block.self_attn, stack.config
    before = None if block.post else block.input_layernorm

    def into(linear: Any) -> Tensor:
        """Rows of each head: heads, H, D."""
        return reading(linear.weight().detach().float(), before).unflatten(0, (-1, attention.head_dim))

    q_NHD, k_KHD, v_KHD = into(attention.q_proj), into(attention.k_proj), into(attention.v_proj)
    q_NHD, k_KHD = writing(q_NHD, attention.q_norm) * attention.scale, writing(k_KHD, attention.k_norm)
    q_NHD, k_KHD = _turned(stack, config.windows[number], q_NHD, k_KHD, distances)
    o_DI = writing(attention.o_proj.weight().detach().float(), block.attn_out_layernorm)
    if block.attn_scale is not None:
        o_DI = o_DI * block.attn_scale.lambda1.detach().float()[:, None]
    return LayerHeads(
        number,
        q_NHD,
        k_KHD.repeat_interleave(attention.group, 0),
        v_KHD.repeat_interleave(attention.group, 0),
        o_DI.unflatten(1, (-1, attention.head_dim)).transpose(0, 1),
        tuple(head // attention.group for head in range(len(q_NHD))),
    )


def _turned(
    stack: Stack, window: int | None, q_NHD: Tensor, k_KHD: Tensor, distances: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Queries turned as at these distances (the mean of them), keys as at position 0."""
    if stack.rotary is None:
        return q_NHD, k_KHD
    used = stack.local_rotary if window is not None and stack.local_rotary is not None else stack.rotary
    rotary = RotaryEmbedding(used.rope, used.head_dim)  # one of its own: a dynamic one remembers what it saw

    def turn(matrix_NHD: Tensor, places: Sequence[int]) -> Tensor:
        positions = torch.tensor([places], device=matrix_NHD.device)
        cos_R, sin_R = (angle[0, :, 0].mean(0) for angle in rotary(positions, torch.float32))
        return rotate(matrix_NHD.mT, cos_R, sin_R).mT

    return turn(q_NHD, distances), turn(k_KHD, (0,))

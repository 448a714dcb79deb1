"""Which heads read what earlier heads wrote: Q-, K- and V-composition (Elhage et al. 2021), from weights alone.

An earlier head writes OV_1 x into the stream; a later one may read it to ask (Q), to be found (K), or to carry on (V):

    Q   ‖ QK_2^T OV_1 ‖ / ‖QK_2‖ ‖OV_1‖          K   ‖ QK_2 OV_1 ‖ / ‖QK_2‖ ‖OV_1‖
    V   ‖ OV_2  OV_1 ‖ / ‖OV_2‖ ‖OV_1‖           Frobenius norms; between 0 and 1

Two heads that have nothing to do with each other do not score 0 but

    baseline   1 / √D

the root mean square over all rotations R of the stream between them, whatever the two matrices are:
mean ‖A R B‖² = ‖A‖² ‖B‖² / D. It is subtracted, so that what is left is more (or, below 0, less) than chance.
(TransformerLens subtracts nothing; Elhage et al. a mean over random matrices of the same shape, which is this number.)

How large: each head is two small matrices (factored.reduced), the products of all pairs of two layers are one.
An induction head shows in K: it looks for tokens by what a previous-token head wrote there.
"""

# N heads of a layer, M heads of all layers, D hidden_size, H head_dim

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bildung.look.attention_heads.head_weights import LayerHeads

KINDS = ("Q", "K", "V")


def baseline(hidden_size: int) -> float:
    """What two heads score by chance: 1 / √D."""
    return hidden_size**-0.5


@torch.no_grad()
def composition(layers: Sequence[LayerHeads], kinds: Sequence[str] = KINDS) -> dict[str, Tensor]:
    """{"Q", "K", "V": scores MM}: row the later head, column the earlier one, counted layer by layer. Nothing is
    subtracted; NaN where the second is not in an earlier layer."""
    counts = [len(layer.q_NHD) for layer in layers]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    writers = [_normal(_left(layer.v_NHD.mT, layer.o_NDH.mT).mT) for layer in layers]
    found = {kind: torch.full((sum(counts),) * 2, float("nan")) for kind in kinds}
    for later, layer in enumerate(layers):
        for kind, reader_NHD in _readers(layer, kinds).items():
            for earlier in range(later):
                scores_NN = _norms(reader_NHD, writers[earlier])
                rows, columns = slice(starts[later], starts[later] + counts[later]), starts[earlier]
                found[kind][rows, columns : columns + counts[earlier]] = scores_NN.cpu()
    return found


@torch.no_grad()
def composition_with(
    layers: Sequence[LayerHeads], writer: tuple[int, int], kinds: Sequence[str] = KINDS
) -> dict[str, Tensor]:
    """{kind: scores (layers, N)} of every head with one earlier head (layer, head); NaN up to that layer."""
    number, head = writer
    one = layers[number]
    writer_NDH = _normal(_left(one.v_NHD.mT, one.o_NDH.mT).mT)[head : head + 1]
    found: Mapping[str, list[Tensor]] = {kind: [] for kind in kinds}
    for later, layer in enumerate(layers):
        for kind, reader_NHD in _readers(layer, kinds).items():
            scores_N = _norms(reader_NHD, writer_NDH)[:, 0].cpu()
            found[kind].append(scores_N if later > number else torch.full_like(scores_N, float("nan")))
    return {kind: torch.stack(rows) for kind, rows in found.items()}


def _readers(layer: LayerHeads, kinds: Sequence[str]) -> dict[str, Tensor]:
    """{kind: NHD} of norm 1: what of the stream each head reads for its queries, its keys, its values."""
    made = {
        "Q": lambda: _left(layer.k_NHD.mT, layer.q_NHD),  # QK^T = K^T Q
        "K": lambda: _left(layer.q_NHD.mT, layer.k_NHD),
        "V": lambda: _left(layer.o_NDH, layer.v_NHD),
    }
    return {kind: _normal(made[kind]()) for kind in kinds}


def _left(a_NDH: Tensor, b_NHD: Tensor) -> Tensor:
    """R B of the same norm as A B, where A = Q R: the directions that A writes to do not matter here."""
    return torch.linalg.qr(a_NDH, "r").R @ b_NHD


def _normal(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def _norms(reader_NHD: Tensor, writer_NDH: Tensor) -> Tensor:
    """‖reader writer‖ of every pair, (later heads, earlier heads), by one product."""
    (N, H, D), (earlier, _, width) = reader_NHD.shape, writer_NDH.shape
    product = reader_NHD.reshape(N * H, D) @ writer_NDH.transpose(0, 1).reshape(D, earlier * width)
    return product.view(N, H, earlier, width).square().sum((1, 3)).sqrt()

"""Do two models represent a text alike, layer by layer? Linear CKA (Kornblith et al. 2019, arXiv 1905.00414).

    K = X Xᵀ, L = Y Yᵀ        how alike two tokens are in one layer of A, and of B: P x P, whatever the layers' widths
    CKA = HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L))

    biased      HSIC = ⟨HKH, HLH⟩, H = 1 - 1/P                                           Kornblith et al., section 3
    debiased    HSIC = ⟨K̃, L̃⟩, K̃ = K without its diagonal, centred without it           Song et al. 2012, eq. 5

Neither changes when a layer is rotated, reflected, shifted or multiplied by a number; both change when one direction is
stretched, as they should. The biased one goes to 1 for *any* two layers as their width grows beyond the number of
tokens (two random ones of 20 tokens and 200 features: 0.9); the debiased one stays at 0 on average. So the debiased one
is what is shown (as in Nguyen et al. 2021, arXiv 2010.15327, who sum it over batches), and it can be a little below 0.

The first token of each row is left out: in many models its vector is a hundred times longer than all others, and with
it CKA would measure that one token.
"""

# P tokens, D hidden_size, N M layers

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene, sites

FEWEST = 4  # tokens: the debiased estimate divides by P (P - 3)


@dataclass(frozen=True)
class Similarity:
    """rows: A's streams, columns: B's; "embed" is what enters layer 0, "3" what leaves layer 3."""

    rows: list[str]
    columns: list[str]
    debiased_NM: Tensor
    biased_NM: Tensor
    tokens: int


@torch.no_grad()
def similarity(
    a: LanguageModel,
    b: LanguageModel,
    rows_a: Sequence[Sequence[int]],
    rows_b: Sequence[Sequence[int]] | None = None,
    places: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
) -> Similarity:
    """CKA of every layer of A with every layer of B on rows of token ids (rows_b: B's, if it has other ids).

    places: for each row, the positions of A and of B that belong together; default: all but the first of both.
    Raises DataError for fewer than 4 tokens or models that do not read text.
    """
    rows_b = rows_a if rows_b is None else rows_b
    chosen = places or [(range(1, len(row)), range(1, len(row))) for row in rows_a]
    first = states(a, rows_a, [pair[0] for pair in chosen])
    second = states(b, rows_b, [pair[1] for pair in chosen])
    tokens = len(next(iter(first.values())))
    if tokens < FEWEST:
        raise DataError(f"{tokens} tokens are too few to compare representations; at least {FEWEST} are needed.")
    xs, ys = list(first.values()), list(second.values())
    return Similarity(list(first), list(second), cka(xs, ys), cka(xs, ys, debiased=False), tokens)


def cka(xs: Sequence[Tensor], ys: Sequence[Tensor], debiased: bool = True) -> Tensor:
    """Linear CKA of every x_PD with every y_PD, N x M in float64. The same tokens stand in the same rows of all."""
    centre = centred_without_diagonal if debiased else centred
    first, second = (torch.stack([_unit(centre(gram(x)).flatten()) for x in some]) for some in (xs, ys))
    return first @ second.mT


def gram(x_PD: Tensor) -> Tensor:
    """K_PP = X Xᵀ, of X without its mean, which changes no CKA and keeps the numbers small."""
    x_PD = x_PD.double()
    x_PD = x_PD - x_PD.mean(0)
    return x_PD @ x_PD.mT


def centred(gram_PP: Tensor) -> Tensor:
    """HKH."""
    return gram_PP - gram_PP.mean(0) - gram_PP.mean(1, keepdim=True) + gram_PP.mean()


def centred_without_diagonal(gram_PP: Tensor) -> Tensor:
    """K̃: the products of two such, over P (P - 3), are the unbiased HSIC (Székely & Rizzo 2014, proposition 1)."""
    P = len(gram_PP)
    K = gram_PP - torch.diag(gram_PP.diagonal())
    row_P = K.sum(0) / (P - 2)
    K = K - row_P - row_P[:, None] + K.sum() / ((P - 1) * (P - 2))
    return K - torch.diag(K.diagonal())


@torch.no_grad()
def states(lm: LanguageModel, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The residual stream at chosen positions of every row, P x D: what enters the first layer, what leaves each.

    Of an encoder-decoder both stacks, the text being source and target. Raises DataError for a model without layers.
    """
    last = [name for name in sites(lm.model) if name.endswith(".resid_post")]
    wanted = {f"{name.partition('layers.')[0]}layers.0.resid_pre": "embed" for name in last}
    wanted = {site: site.partition("layers.")[0] + name for site, name in wanted.items()}
    wanted |= {name: name.replace("layers.", "").removesuffix(".resid_post") for name in last}
    if not last or lm.config.kind == "vision":
        raise DataError(f"a {lm.config.model_type} of kind {lm.config.kind!r} has no layers that read text.")
    found: dict[str, list[Tensor]] = {name: [] for name in wanted.values()}
    for ids, chosen in zip(rows, places, strict=True):
        index = torch.tensor(list(chosen), dtype=torch.long, device=lm.model.device)

        def keeper(name: str, index: Tensor) -> object:
            return lambda x_BLD: found[name].append(x_BLD[0, index].float().cpu())

        tokens_BL = torch.tensor([list(ids)], device=lm.model.device)
        with intervene(lm.model, {site: keeper(name, index) for site, name in wanted.items()}):  # type: ignore[misc]
            (lm.model.given(tokens_BL) if hasattr(lm.model, "given") else lm.model).hidden(tokens_BL)
    order = sorted(found, key=lambda name: name.startswith("decoder"))
    return {name: torch.cat(found[name]) for name in order}


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(1e-300)

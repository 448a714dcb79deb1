"""Shifted sparse attention: long rows at the price of short ones, in training only (LongLoRA, Chen et al. 2024, arXiv
2309.12307, section 3.2).

    first half of the heads     |0 1 2 3|4 5 6 7|8 9 . .|       a token sees those of its group before it
    second half                 |0 1|2 3 4 5|6 7 8 9|. .|       the same, half a group further: borders are crossed

Attention costs L · G instead of L · L. At inference the model attends fully: the weights learned nothing that needs
groups.

The authors roll the second half of the heads by half a group and roll it back, so that their last group holds the end
of the row and its beginning, and the beginning sees the end (in their code, except the one for flash-attention, and in
copies of it: the loss is then of a model that reads what it is to predict). Here the row's two ends are groups of half
the length, and nothing is seen that comes later.
"""

# B rows, N heads, K key-value heads, L length, G tokens of a group, H head dim

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import SettingsError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]  # q, k, v, allowed, causal -> z


def shifted_attention(
    q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, allowed_B1LL: Tensor | None, group: int, kernel: Kernel
) -> Tensor:
    """z (B N L H) of causal attention inside groups of `group` tokens, shifted by half a group for half of the heads.

    allowed_B1LL: None for plain causal rows; else who may see whom (packed, padded), and the groups come on top.
    Raises SettingsError for a length that is no multiple of the group, an odd group, or a single head.
    """
    _, N, L, _ = q_BNLH.shape
    if group % 2 or L % group or N < 2:
        raise SettingsError(
            f"shifted attention cuts rows into groups of an even number of tokens, for two halves of the heads; rows "
            f"of {L}, groups of {group} and {N} heads were given. Take a length that is a multiple of the group."
        )
    k_BNLH, v_BNLH = (t.repeat_interleave(N // t.shape[1], dim=1) for t in (k_BKLH, v_BKLH))
    if group == L:
        return kernel(q_BNLH, k_BNLH, v_BNLH, allowed_B1LL, allowed_B1LL is None)
    halves = [[t[:, heads] for t in (q_BNLH, k_BNLH, v_BNLH)] for heads in (slice(N // 2), slice(N // 2, N))]
    if allowed_B1LL is not None:
        places_L = torch.arange(L, device=q_BNLH.device)
        found = []
        for (q, k, v), shift in zip(halves, (0, group // 2), strict=True):
            number_L = (places_L + shift) // group
            found.append(kernel(q, k, v, allowed_B1LL & (number_L[:, None] == number_L), False))
        return torch.cat(found, dim=1)
    half = group // 2
    plain = _grouped(halves[0], group, kernel)
    ends = _grouped([torch.cat((t[:, :, :half], t[:, :, L - half :]), dim=2) for t in halves[1]], half, kernel)
    between = _grouped([t[:, :, half : L - half] for t in halves[1]], group, kernel)
    return torch.cat((plain, torch.cat((ends[:, :, :half], between, ends[:, :, half:]), dim=2)), dim=1)


def _grouped(qkv_BNLH: list[Tensor], group: int, kernel: Kernel) -> Tensor:
    """Causal attention inside consecutive groups: each is a row of the kernel's batch."""
    B, N, L, H = qkv_BNLH[0].shape
    q, k, v = (t.reshape(B, N, L // group, group, H).transpose(1, 2).flatten(0, 1) for t in qkv_BNLH)
    return kernel(q, k, v, None, True).view(B, L // group, N, group, H).transpose(1, 2).reshape(B, N, L, H)


@contextmanager
def shifted(model: nn.Module, share: float) -> Iterator[None]:
    """While the block runs, every self-attention of `model` is shifted in training, in groups of `share` of a row.

    Raises SettingsError for a model that has none, or a share that is none.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "shifted_share")]
    if not layers or not 0 < share <= 1:
        raise SettingsError(
            f"a share of {share} of a row was given; it must lie in (0, 1], for a model with attention."
        )
    for layer in layers:
        layer.shifted_share = share
    try:
        yield
    finally:
        for layer in layers:
            layer.shifted_share = None

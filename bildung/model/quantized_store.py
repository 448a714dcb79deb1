"""What all quantized stores share: frozen numbers, used through the dequantized matrix.

Activations stay in floating point. A matrix is dequantized, used, and forgotten, and in the backward pass once more, so
training an adapter over it keeps no dense copy (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, eq. 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import ModelFileError
from bildung.model.linear import WeightStore

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class _DequantizedLinear(torch.autograd.Function):
    """x W^T for a frozen quantized W; saves nothing, dequantizes again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, store: WeightStore) -> Tensor:
        ctx.store = store
        return F.linear(x, store.dense().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.store.dense().to(grads[0].dtype), None


class Quantized(WeightStore):
    """A store whose `dense()` comes out in `dtype`, the type the matrix had before."""

    dtype: torch.dtype

    def forward(self, x_BLI: Tensor, bias_O: Tensor | None) -> Tensor:
        y_BLO: Tensor = _DequantizedLinear.apply(x_BLI, self)
        return y_BLO if bias_O is None else y_BLO + bias_O.to(y_BLO.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        """`model.to(...)`: the device changes, and the type of `dense()`; the stored constants are never rounded."""
        for name, buffer in list(self.named_buffers()):
            moved = fn(torch.empty(0, dtype=self.dtype, device=buffer.device))
            setattr(self, name, buffer.to(moved.device))
        self.dtype = moved.dtype
        return self

    @property
    def stored_bytes(self) -> int:
        """Bytes that grow with the matrix; code books, which are constants of the method, are not counted."""
        raise NotImplementedError


def check_finite(tensors: dict[str, Tensor], *names: str) -> None:
    """Raises ModelFileError when constants read from a file are not finite numbers."""
    for name in names:
        if not tensors[name].is_floating_point() or not bool(torch.isfinite(tensors[name]).all()):
            raise ModelFileError(f"{name} of a quantized matrix holds values that are not finite; the file is damaged.")

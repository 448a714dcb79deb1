"""Matrix products in 8 bits (Micikevicius et al. 2022, arXiv 2209.05433), for training on GPUs that have them.

    e4m3   s eeee mmm   up to 448, 3 bits of fraction        inputs and weights
    e5m2   s eeeee mm   up to 57344, 2 bits of fraction      gradients, which need range more than digits

    y = (x / s_x)₈ (W / s_W)₈ᵀ · s_x s_W          s = largest |number| of the tensor / the largest the format has

Weights stay what they are (float32 masters, or bfloat16) and are rounded for each use; sums are float32, results come
in the type of the activations. Only products inside layers, whose sizes are multiples of 16, are taken: the
unembedding's logits need more digits. What is kept of an input for the backward pass is its 8-bit form.

The products are torch._scaled_mm's. A CPU computes them exactly, but slowly: there it is for tests of the arithmetic.
On a GPU this has not been run yet.
"""

# N tokens, I input features, O output features

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bildung.core.errors import SettingsError
from bildung.model.base import Model
from bildung.model.linear import Dense

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of all sizes, as the kernels want them
NEEDED = (8, 9)  # compute capability: Ada (RTX 40, L4), Hopper (H100) and later


class Fp8Dense(Dense):
    """A dense matrix whose products are in 8 bits while it trains; in evaluation it is an ordinary one."""

    def forward(self, x_BLI: Tensor, bias_O: Tensor | None) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x_BLI, bias_O)
        y_BLO: Tensor = _Product.apply(x_BLI.flatten(0, -2), self.weight).unflatten(0, x_BLI.shape[:-1])
        return y_BLO if bias_O is None else y_BLO + bias_O.to(y_BLO.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ and its two gradients, each a product of 8-bit numbers."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        x8_NI, x_scale = quantize(_padded(x_NI), E4M3)
        w8_OI, w_scale = quantize(weight_OI, E4M3)
        ctx.save_for_backward(x8_NI, x_scale, w8_OI, w_scale)
        ctx.types = x_NI.dtype, weight_OI.dtype
        return product(x8_NI, w8_OI, x_scale, w_scale, x_NI.dtype)[: len(x_NI)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x8_NI, x_scale, w8_OI, w_scale = ctx.saved_tensors
        dy8_NO, dy_scale = quantize(_padded(dy_NO), E5M2)
        dx_NI = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx_NI = product(dy8_NO, w8_OI.t().contiguous(), dy_scale, w_scale, ctx.types[0])[: len(dy_NO)]
        if ctx.needs_input_grad[1]:
            dy8_ON, x8_IN = dy8_NO.t().contiguous(), x8_NI.t().contiguous()
            dweight_OI = product(dy8_ON, x8_IN, dy_scale, x_scale, ctx.types[0]).to(ctx.types[1])
        return dx_NI, dweight_OI


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in 8 bits, scale): the largest number becomes the largest of the format. scale is float32, 0-dim."""
    wide = x.float()
    scale = (wide.abs().amax() / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    largest = torch.finfo(dtype).max
    return (wide / scale).clamp(-largest, largest).to(dtype), scale


def product(a8_NI: Tensor, b8_OI: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a bᵀ of shape N O, scaled back. All sizes are multiples of 16."""
    y_NO: Tensor = torch._scaled_mm(a8_NI, b8_OI.t(), a_scale, b_scale, out_dtype=dtype)
    return y_NO


def _padded(x_NI: Tensor) -> Tensor:
    """Rows of zeros up to a multiple: their number is the inner size of one product."""
    missing = -len(x_NI) % MULTIPLE
    return F.pad(x_NI, (0, 0, 0, missing)) if missing else x_NI


def use_fp8(model: Model) -> list[str]:
    """Let the dense matrices inside the layers multiply in 8 bits; returns their names. Raises SettingsError where the
    device has no such products, or no matrix fits."""
    check_device(model.device)
    chosen = []
    for name, linear in model.linears().items():
        fits = linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
        if ".layers." in f".{name}" and fits and type(linear.base) is Dense:
            linear.base = Fp8Dense(linear.base.weight).train(linear.training)
            chosen.append(name)
    if not chosen:
        raise SettingsError(
            f"precision = 'fp8': no matrix fits. It must be inside the layers, unquantized, its sizes multiples of "
            f"{MULTIPLE}; use bf16."
        )
    return chosen


def leave_fp8(model: Model) -> None:
    """Make them ordinary matrices again."""
    for linear in model.linears().values():
        if isinstance(linear.base, Fp8Dense):
            linear.base = Dense(linear.base.weight).train(linear.training)


def check_device(device: torch.device) -> None:
    """Raises SettingsError where torch._scaled_mm has no kernel."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise SettingsError(f"precision = 'fp8' needs an NVIDIA GPU; the model is on {device}. Use bf16 or fp32.")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < NEEDED:
        raise SettingsError(
            f"precision = 'fp8' needs a GPU of compute capability {NEEDED[0]}.{NEEDED[1]} (Ada, Hopper or later); "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}. Use bf16."
        )

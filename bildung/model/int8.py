"""Int8: one scale per output channel, the least harmful quantization there is.

    w ≈ q · scale,   q in [-127, 127],   scale = max|w| / 127 of each row      (symmetric, absmax; -128 is not used)

Written as compressed-tensors `pack-quantized`, which transformers and vLLM load. Dense weights come out as transformers
computes them, so logits are equal.
"""

# O output features, I input features

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import ModelFileError
from bildung.model.quantized_store import Quantized, check_finite

# Up to so many rows of input, torch's int8 kernel beats dequantizing and multiplying (benchmarks/quantized.py).
FEW_ROWS = 16
KEYS = {"weight_packed", "weight_scale", "weight_shape"}


class Int8(Quantized):
    """8-bit whole numbers and a scale per row."""

    values: Tensor
    scale: Tensor

    def __init__(self, values_OI: Tensor, scale_O1: Tensor, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = values_OI.shape
        self.dtype = dtype
        self.register_buffer("values", values_OI, persistent=False)
        self.register_buffer("scale", scale_O1, persistent=False)

    @classmethod
    def quantize(cls, weight_OI: Tensor) -> Int8:
        """Round each row to 8 bits. The scale is rounded to the weight's own type first, as it will be stored."""
        weight_OI = weight_OI.detach()
        scale_O1 = (weight_OI.float().abs().amax(1, keepdim=True) / 127).to(weight_OI.dtype)
        scale_O1 = torch.where(scale_O1 == 0, torch.ones_like(scale_O1), scale_O1)
        values = (weight_OI.float() / scale_O1.float()).round().clamp(-127, 127).to(torch.int8)
        return cls(values, scale_O1, weight_OI.dtype)

    def forward(self, x_BLI: Tensor, bias_O: Tensor | None) -> Tensor:
        if not self._has_kernel(x_BLI):
            return super().forward(x_BLI, bias_O)
        scale_O = self.scale.flatten().to(x_BLI.dtype)
        y_NO = torch._weight_int8pack_mm(x_BLI.reshape(-1, self.in_features), self.values, scale_O)
        y_BLO = y_NO.view(*x_BLI.shape[:-1], self.out_features)
        return y_BLO if bias_O is None else y_BLO + bias_O.to(y_BLO.dtype)

    def _has_kernel(self, x_BLI: Tensor) -> bool:
        """Decoding on the CPU: reads 8 bits per weight instead of 16. The kernel sums in float32, so its results differ
        from the dequantized product by bfloat16 rounding. It reads beyond the end of sizes that are not multiples."""
        return (
            x_BLI.dtype == torch.bfloat16
            and x_BLI.device.type == "cpu"
            and x_BLI.numel() <= FEW_ROWS * self.in_features
            and self.in_features % 64 == 0
            and self.out_features % 64 == 0
            and not (x_BLI.requires_grad and torch.is_grad_enabled())
        )

    def dense(self) -> Tensor:
        return self.values.to(self.dtype) * self.scale.to(self.dtype)

    def part(self, dim: int, number: int, count: int) -> Int8:
        """One of `count` equal parts, cut by rows (dim 0) or columns (dim 1)."""
        scale_O1 = self.scale.chunk(count)[number].clone() if dim == 0 else self.scale
        return Int8(self.values.chunk(count, dim)[number].clone(), scale_O1, self.dtype)

    def joined(self, parts: dict[str, list[Tensor]], dim: int) -> Int8:
        """The whole of which this is a part, from the buffers of all parts."""
        scale_O1 = torch.cat(parts["scale"]) if dim == 0 else self.scale
        return Int8(torch.cat(parts["values"], dim), scale_O1, self.dtype)

    @property
    def stored_bytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Four values per int32, offset by 128, first value in the lowest byte; columns padded to a multiple of 4."""
        bytes_OI = self.values.view(torch.uint8) ^ 128  # q + 128: in two's complement, the highest bit turned
        packed = F.pad(bytes_OI, (0, -self.in_features % 4)).view(torch.int32)
        shape = torch.tensor([self.out_features, self.in_features])
        return {"weight_packed": packed, "weight_scale": self.scale, "weight_shape": shape}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Int8:
        """Inverse of `tensors`. Raises ModelFileError when they do not hold a matrix of this shape."""
        if tensors.keys() != KEYS:
            raise ModelFileError(
                f"an 8-bit matrix is stored as {', '.join(sorted(tensors))}; symmetric and packed it is "
                f"{', '.join(sorted(KEYS))}."
            )
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        out_features, in_features = shape
        expected = (out_features, -(-in_features // 4))
        fits = tensors["weight_shape"].tolist() == list(shape) and packed.dtype == torch.int32
        if not fits or packed.shape != expected or scale.shape != (out_features, 1):
            raise ModelFileError(
                f"packed weights of shape {tuple(packed.shape)} with scales {tuple(scale.shape)} do not "
                f"hold an 8-bit matrix {shape} with one scale per row."
            )
        check_finite(tensors, "weight_scale")
        values = packed.contiguous().view(torch.uint8)[:, :in_features] ^ 128
        return cls(values.view(torch.int8).contiguous(), scale, dtype)

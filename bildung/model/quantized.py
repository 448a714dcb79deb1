"""Quantized weight stores: Int8 with one scale per output channel, and NF4 with double quantization.

Each is written in a format that others load: Int8 as compressed-tensors `pack-quantized` (transformers, vLLM), NF4 as
bitsandbytes' own keys. Activations stay in floating point: a matrix is dequantized, used, and forgotten, in the
backward pass once more, so training adapters over it keeps no dense copy.

NF4 and double quantization: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3. The 4-bit codes and their
packing equal bitsandbytes bit for bit. Of the 8-bit block constants about one in a thousand differs by one code: there
bitsandbytes' CPU kernel (0.50) looks the value up in a coarse table, here it is the nearest code.
"""

# O output features, I input features, G blocks of 64 weights

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import ConfigError, ModelFileError
from bildung.model.linear import WeightStore

# fmt: off
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
NF4_BLOCK, ABSMAX_BLOCK = 64, 256
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


class _Quantized(WeightStore):
    """What both stores share: matmul through the dequantized matrix, in the type it had before (`dtype`)."""

    dtype: torch.dtype

    def forward(self, x_BLI: Tensor, bias_O: Tensor | None) -> Tensor:
        y_BLO: Tensor = _DequantizedLinear.apply(x_BLI, self)
        return y_BLO if bias_O is None else y_BLO + bias_O.to(y_BLO.dtype)


class Int8(_Quantized):
    """w ≈ q * scale, q in [-127, 127], scale = max|w| / 127 of each output channel (absmax, symmetric)."""

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
        scale_O1 = (weight_OI.float().abs().amax(1, keepdim=True) / 127).to(weight_OI.dtype)
        scale_O1 = torch.where(scale_O1 == 0, torch.ones_like(scale_O1), scale_O1)
        values = (weight_OI.float() / scale_O1.float()).round().clamp(-127, 127).to(torch.int8)
        return cls(values, scale_O1, weight_OI.dtype)

    def dense(self) -> Tensor:
        return self.values.to(self.dtype) * self.scale.to(self.dtype)

    @property
    def stored_bytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Four values per int32, offset by 128, first value in the lowest byte; columns padded to a multiple of 4."""
        offset = F.pad(self.values.to(torch.int32) + 128, (0, -self.in_features % 4))
        shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int64)
        packed = (offset.view(self.out_features, -1, 4).to(torch.int64) << shifts).sum(-1)
        packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        shape = torch.tensor([self.out_features, self.in_features])
        return {"weight_packed": packed, "weight_scale": self.scale, "weight_shape": shape}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Int8:
        """Inverse of `tensors`."""
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        out_features, in_features = shape
        if packed.shape != (out_features, -(-in_features // 4)) or scale.shape != (out_features, 1):
            raise ModelFileError(
                f"packed weights of shape {tuple(packed.shape)} with scales {tuple(scale.shape)} do not "
                f"hold an 8-bit matrix {shape} with one scale per row."
            )
        shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
        values = ((packed[..., None] >> shifts) & 255).view(out_features, -1)[:, :in_features] - 128
        return cls(values.to(torch.int8).contiguous(), scale, dtype)


@cache
def dynamic_map() -> Tensor:
    """The 256 signed codes of 8-bit dynamic quantization (Dettmers 2015; bitsandbytes' `create_dynamic_map`).

    For each of seven exponents 10^-6..1 a run of fractions that doubles in number: fine near zero, coarse near one.
    """
    codes: list[float] = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        codes += ((10 ** (-6 + exponent)) * means).tolist() + (-(10 ** (-6 + exponent)) * means).tolist()
    return torch.tensor(sorted([*codes, 0.0, 1.0]), dtype=torch.float32)


def _nearest_code(values: Tensor, code: Tensor) -> Tensor:
    """Index of the closest code of each value; `code` is sorted."""
    return torch.bucketize(values, (code[1:] + code[:-1]) / 2).to(torch.uint8)


def _by_blocks(values: Tensor, block: int) -> Tensor:
    """(N,) -> (N/block, block), the last block filled with zeros."""
    return F.pad(values, (0, -values.numel() % block)).view(-1, block)


class Nf4(_Quantized):
    """4-bit codes at the quantiles of a normal distribution, one absmax per 64 weights, itself in 8 bits."""

    code: Tensor
    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor,
        nested_offset: Tensor,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ):
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        for name, tensor in (
            ("codes", codes),
            ("absmax", absmax),
            ("nested_absmax", nested_absmax),
            ("nested_offset", nested_offset),
            ("code", torch.tensor(NF4_CODE)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def quantize(cls, weight_OI: Tensor) -> Nf4:
        """Block-wise NF4 of the flattened matrix, then its block maxima quantized in turn (0.127 bit per weight)."""
        blocks = _by_blocks(weight_OI.detach().float().flatten(), NF4_BLOCK)
        absmax_G = blocks.abs().amax(1)
        # Multiply by the reciprocal, as bitsandbytes does: x / absmax rounds differently at code boundaries.
        scaled = blocks * (1.0 / absmax_G.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
        codes = _nearest_code(scaled.flatten()[: weight_OI.numel()], torch.tensor(NF4_CODE))
        if codes.numel() % 2:
            codes = F.pad(codes, (0, 1))
        packed = (codes[0::2] << 4) | codes[1::2]  # the first of two weights in the high nibble
        offset = absmax_G.mean()
        nested = _by_blocks(absmax_G - offset, ABSMAX_BLOCK)
        nested_absmax = nested.abs().amax(1)
        nested_scaled = nested * (1.0 / nested_absmax.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
        absmax = _nearest_code(nested_scaled.flatten()[: absmax_G.numel()], dynamic_map())
        shape = (weight_OI.shape[0], weight_OI.shape[1])
        return cls(packed[:, None], absmax, nested_absmax, offset, shape=shape, dtype=weight_OI.dtype)

    def block_maxima(self) -> Tensor:
        """The absmax of each block of 64 weights, dequantized (G,)."""
        code = dynamic_map().to(self.absmax.device)
        nested = _by_blocks(code[self.absmax.long()], ABSMAX_BLOCK) * self.nested_absmax[:, None]
        return nested.flatten()[: self.absmax.numel()] + self.nested_offset

    def dense(self) -> Tensor:
        packed = self.codes.flatten()
        codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: self.out_features * self.in_features]
        values = _by_blocks(self.code[codes.long()], NF4_BLOCK) * self.block_maxima()[:, None]
        return values.flatten()[: codes.numel()].view(self.out_features, self.in_features).to(self.dtype)

    @property
    def stored_bytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.nested_absmax.nbytes + self.nested_offset.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """bitsandbytes' keys; `quant_state` is a JSON text as bytes."""
        state = {
            "quant_type": "nf4",
            "blocksize": NF4_BLOCK,
            "dtype": DTYPE_NAMES[self.dtype],
            "shape": [self.out_features, self.in_features],
            "nested_blocksize": ABSMAX_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": self.nested_offset.item(),
        }
        return {
            "weight": self.codes,
            "weight.absmax": self.absmax,
            "weight.quant_map": self.code,
            "weight.nested_absmax": self.nested_absmax,
            "weight.nested_quant_map": dynamic_map(),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Nf4:
        """Inverse of `tensors`; refuses other block sizes or code books than the ones above."""
        try:
            state = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist()))
            offset = torch.tensor(float(state["nested_offset"]))
            stored = {name: state[name] for name in ("blocksize", "nested_blocksize", "shape", "dtype")}
        except (KeyError, ValueError, TypeError) as error:
            raise ModelFileError(f"the bitsandbytes quant_state of a matrix cannot be read ({error!r}).") from error
        blocks = -(-shape[0] * shape[1] // NF4_BLOCK)
        sound = (
            stored["blocksize"] == NF4_BLOCK
            and stored["nested_blocksize"] == ABSMAX_BLOCK
            and tuple(stored["shape"]) == shape
            and tensors["weight"].numel() == -(-shape[0] * shape[1] // 2)
            and tensors["weight.absmax"].shape == (blocks,)
            and tensors["weight.nested_absmax"].shape == (-(-blocks // ABSMAX_BLOCK),)
            and torch.equal(tensors["weight.quant_map"], torch.tensor(NF4_CODE))
            and torch.equal(tensors["weight.nested_quant_map"], dynamic_map())
        )
        if not sound:
            raise ModelFileError(
                f"an NF4 matrix with state {stored} does not fit {shape}, blocks of {NF4_BLOCK} and double "
                f"quantization in blocks of {ABSMAX_BLOCK}; only that layout is read."
            )
        return cls(
            tensors["weight"],
            tensors["weight.absmax"],
            tensors["weight.nested_absmax"],
            offset,
            shape=shape,
            dtype=dtype,
        )


METHODS: dict[str, type[Int8] | type[Nf4]] = {"int8": Int8, "nf4": Nf4}


def method_of(raw_config: dict[str, Any]) -> str | None:
    """The name in METHODS, or None when not quantized, by config.json's `quantization_config`. Else a ConfigError."""
    given = raw_config.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else None
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    if method == "bitsandbytes" and nf4.items() <= given.items():
        return "nf4"
    if method == "compressed-tensors" and given.get("format") == "pack-quantized":
        weights = [group.get("weights") or {} for group in (given.get("config_groups") or {}).values()]
        if all(w.get("num_bits") == 8 and w.get("symmetric") and w.get("strategy") == "channel" for w in weights):
            return "int8"
    raise ConfigError(
        f"config.json: quantization_config {str(given)[:200]} is not read here; readable: bitsandbytes NF4 with double "
        f"quantization, and compressed-tensors pack-quantized with 8-bit symmetric channels."
    )


def describe(method: str, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` by which transformers recognises the stored format. `kept`: matrices left dense."""
    if method == "nf4":
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": DTYPE_NAMES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept,
        }
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }

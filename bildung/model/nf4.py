"""NF4 with double quantization: 4 bits per weight at the quantiles of a normal distribution (QLoRA).

    w ≈ NF4_CODE[c] · absmax of its block of 64,   absmax ≈ mean + dynamic_map[d] · absmax of its block of 256

Bits per weight: 4 + 8/64 + 32/(64·256) = 4.127; with the absmax kept in float32 they would be 4 + 32/64 = 4.5.

Dettmers et al. 2023 (arXiv 2305.14314), section 3. Written with bitsandbytes' own keys, and codes and packing equal
bitsandbytes bit for bit. Of the 8-bit block constants about one in a thousand differs by one code: there bitsandbytes'
CPU kernel (0.50) looks the value up in a coarse table, here it is the nearest code.
"""

# O output features, I input features, G blocks of 64 weights

from __future__ import annotations

import json
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import ModelFileError, SettingsError
from bildung.model.blockwise import by_blocks, dynamic_map, nearest_code, scaled
from bildung.model.quantized_store import DTYPE_NAMES, Quantized, check_finite

# fmt: off
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
NF4_BLOCK, ABSMAX_BLOCK = 64, 256
QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"
KEYS = {"weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", QUANT_STATE}


@cache
def code_pairs(device: torch.device) -> Tensor:
    """The two NF4 values each byte stands for, their 8 bytes seen as one int64: one look-up fetches both (256,)."""
    code = torch.tensor(NF4_CODE)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)  # first of two in the high nibble
    return pairs.view(torch.int64).flatten().to(device)


class Nf4(Quantized):
    """4-bit codes, one absmax per 64 weights, itself in 8 bits."""

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
        self._cut: tuple[int, int, int] | None = None  # of a part: which one, of how many, blocks in a whole row (or 0)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.register_buffer("nested_absmax", nested_absmax, persistent=False)
        self.register_buffer("nested_offset", nested_offset, persistent=False)

    @classmethod
    def quantize(cls, weight_OI: Tensor) -> Nf4:
        """Block-wise NF4 of the flattened matrix, then its block maxima quantized in turn (0.127 bit per weight)."""
        weight_OI = weight_OI.detach()
        blocks = by_blocks(weight_OI.float().flatten(), NF4_BLOCK)
        absmax_G = blocks.abs().amax(1)
        codes = nearest_code(scaled(blocks, absmax_G).flatten()[: weight_OI.numel()], torch.tensor(NF4_CODE))
        codes = F.pad(codes, (0, codes.numel() % 2))
        packed = (codes[0::2] << 4) | codes[1::2]
        offset = absmax_G.mean()
        nested = by_blocks(absmax_G - offset, ABSMAX_BLOCK)
        nested_absmax = nested.abs().amax(1)
        absmax = nearest_code(scaled(nested, nested_absmax).flatten()[: absmax_G.numel()], dynamic_map())
        shape = (weight_OI.shape[0], weight_OI.shape[1])
        return cls(packed[:, None], absmax, nested_absmax, offset, shape=shape, dtype=weight_OI.dtype)

    def block_maxima(self) -> Tensor:
        """The absmax of each block of 64 weights, dequantized (G,)."""
        code = dynamic_map().to(self.absmax.device)
        nested = by_blocks(code[self.absmax.long()], ABSMAX_BLOCK) * self.nested_absmax[:, None]
        return nested.flatten()[: self.absmax.numel()] + self.nested_offset

    def dense(self) -> Tensor:
        pairs = torch.index_select(code_pairs(self.codes.device), 0, self.codes.flatten().int())
        blocks = by_blocks(pairs.view(torch.float32), NF4_BLOCK) * self._own(self.block_maxima())[:, None]
        weights = blocks.flatten()[: self.out_features * self.in_features]
        return weights.view(self.out_features, self.in_features).to(self.dtype)

    def part(self, dim: int, number: int, count: int) -> Nf4:
        """One of `count` equal parts, cut by rows (dim 0) or columns (dim 1), with codes of its own. The constants of
        all blocks, 0.127 bits per weight, stay together, as they are quantized together.

        Raises SettingsError when a block of 64 would be cut.
        """
        shape = [self.out_features, self.in_features]
        shape[dim] //= count
        run = shape[0] * shape[1] if dim == 0 else shape[1]  # numbers that lie side by side
        if run % NF4_BLOCK:
            raise SettingsError(
                f"an NF4 matrix of {self.out_features} x {self.in_features} cut in {count} would cut blocks of "
                f"{NF4_BLOCK}: {run} numbers lie side by side. Use int8, or fewer ranks."
            )
        part = Nf4(
            self.codes,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            shape=(shape[0], shape[1]),
            dtype=self.dtype,
        )
        part._cut = number, count, 0 if dim == 0 else self.in_features // NF4_BLOCK
        part.codes = part._own(self.codes.view(-1, NF4_BLOCK // 2)).reshape(-1, 1).clone()
        return part

    def _own(self, blocks_G: Tensor) -> Tensor:
        """Of something that every block of the whole matrix has (dim 0): what this part's blocks have."""
        if self._cut is None:
            return blocks_G
        number, count, in_a_row = self._cut
        if not in_a_row:
            return blocks_G.chunk(count)[number]
        return blocks_G.unflatten(0, (-1, in_a_row)).chunk(count, 1)[number].flatten(0, 1)

    def joined(self, parts: dict[str, list[Tensor]], dim: int) -> Nf4:
        """The whole of which this is a part, from the buffers of all parts."""
        count = len(parts["codes"])
        rows, columns = self.out_features * (count if dim == 0 else 1), self.in_features * (1 if dim == 0 else count)
        codes = torch.cat(
            [one.view(self.out_features, -1) if dim else one.flatten() for one in parts["codes"]], dim=dim
        )
        rest = self.absmax, self.nested_absmax, self.nested_offset
        return Nf4(codes.reshape(-1, 1), *rest, shape=(rows, columns), dtype=self.dtype)

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
            "weight.quant_map": torch.tensor(NF4_CODE),
            "weight.nested_absmax": self.nested_absmax,
            "weight.nested_quant_map": dynamic_map().clone(),  # safetensors refuses tensors that share memory
            QUANT_STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Nf4:
        """Inverse of `tensors`. Raises ModelFileError for other block sizes, code books, shapes."""
        if tensors.keys() != KEYS:
            raise ModelFileError(
                f"an NF4 matrix is stored as {', '.join(sorted(tensors))}; with double quantization it is "
                f"{', '.join(sorted(KEYS))}."
            )
        try:
            state = json.loads(bytes(tensors[QUANT_STATE].tolist()))
            offset = torch.tensor(float(state["nested_offset"]))
            stored = {name: state[name] for name in ("blocksize", "nested_blocksize", "shape", "dtype")}
        except (KeyError, ValueError, TypeError) as error:
            raise ModelFileError(f"the bitsandbytes quant_state of a matrix cannot be read ({error!r}).") from error
        blocks = -(-shape[0] * shape[1] // NF4_BLOCK)
        sound = (
            stored["blocksize"] == NF4_BLOCK
            and stored["nested_blocksize"] == ABSMAX_BLOCK
            and stored["shape"] == list(shape)
            and tensors["weight"].shape == (-(-shape[0] * shape[1] // 2), 1)
            and tensors["weight.absmax"].shape == (blocks,)
            and tensors["weight"].dtype == tensors["weight.absmax"].dtype == torch.uint8
            and tensors["weight.nested_absmax"].shape == (-(-blocks // ABSMAX_BLOCK),)
            and torch.equal(tensors["weight.quant_map"], torch.tensor(NF4_CODE))
            and torch.equal(tensors["weight.nested_quant_map"], dynamic_map())
        )
        if not sound:
            raise ModelFileError(
                f"an NF4 matrix with state {stored} does not fit {shape}, blocks of {NF4_BLOCK} and double "
                f"quantization in blocks of {ABSMAX_BLOCK}; only that layout is read."
            )
        check_finite({**tensors, "nested_offset": offset}, "weight.nested_absmax", "nested_offset")
        return cls(
            tensors["weight"],
            tensors["weight.absmax"],
            tensors["weight.nested_absmax"],
            offset,
            shape=shape,
            dtype=dtype,
        )

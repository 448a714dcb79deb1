"""GGUF, the one-file format of llama.cpp: typed metadata, then tensors in quantized blocks.

    "GGUF" | version u32 | tensors u64 | pairs u64
    pairs   x  key | type u32 | value                                 a string is its length as u64 and UTF-8 bytes
    tensors x  name | dimensions u32 | sizes u64 each | type u32 | offset u64 from the start of the data
    padding to general.alignment | data

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.) Every number in the header
is a stranger's claim: it is checked against the size of the file before anything is read or allocated. The `gguf`
package parses the same header in Python objects, 1.7 s for 49152 tokens against 0.1 s here; its block decoders are used
as they are.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from bildung.core.errors import ModelFileError, nearest

# The tensor types that can be decoded here, each tested against its definition.
TYPES = {GGMLQuantizationType[name] for name in "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K".split()}
# Value types of the metadata: number -> struct code. 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_NESTING = 3
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is torch's: GGUF writes the sizes fastest-varying first, torch last."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int  # byte in the file
    size: int  # bytes


@dataclass
class GgufFile:
    """A GGUF file, its header read and checked, its tensors decoded when asked for."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap = field(repr=False)

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and place of a tensor. Raises ModelFileError for an unknown name."""
        if name not in self.tensors:
            hint = nearest(name, self.tensors)
            raise ModelFileError(f"{self.path} holds no tensor {name!r} ({len(self.tensors)} tensors). {hint}".rstrip())
        return self.tensors[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor in float32, in torch's order of dimensions. Raises ModelFileError for an unknown name."""
        info = self.info(name)
        raw = np.frombuffer(self.data, np.uint8, info.size, info.start)
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block * block_bytes)
        with np.errstate(invalid="ignore", over="ignore"):  # damaged scales show as non-finite weights, checked later
            values = quants.dequantize(rows, info.kind)
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(info.shape))


def read_gguf(path: str | Path) -> GgufFile:
    """Opens a GGUF file. Raises ModelFileError, naming the place in the file, when it is not a whole, sound one."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelFileError(f"{path} cannot be opened as a GGUF file: {error}") from error
    reader = _Header(path, data)
    metadata, tensors = reader.read()
    return GgufFile(path, metadata, tensors, data)


class _Header:
    """A cursor over the header that cannot leave the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0
        self.what = "the header"

    def fail(self, problem: str) -> NoReturn:
        raise ModelFileError(
            f"{self.path}: {self.what}, byte {self.at}: {problem}. The file is truncated, damaged or not a GGUF file; "
            "fetch it again."
        )

    def take(self, count: int) -> int:
        """The position of the next `count` bytes, which are passed over."""
        start = self.at
        if count > len(self.data) - start:
            self.fail(f"{count} bytes are announced and {len(self.data) - start} are left")
        self.at = start + count
        return start

    def number(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self.data, self.take(layout.size))[0]

    def string(self) -> str:
        length = self.number("Q")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"text that is not UTF-8 ({error.reason})")

    def count(self, smallest: int, things: str) -> int:
        """A count of things that take at least `smallest` bytes each, so that no huge count is believed."""
        count: int = self.number("Q")
        if count * smallest > len(self.data) - self.at:
            self.fail(f"{count} {things} are announced, more than the file can hold")
        return count

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            self.fail(f"value type {kind} is not one of GGUF's 13")
        if depth == MAX_NESTING:
            self.fail(f"arrays are nested more than {MAX_NESTING} deep")
        item = self.number("I")
        if item in SCALARS:
            size = struct.calcsize("<" + SCALARS[item])
            count = self.count(size, "values")
            return list(struct.unpack_from(f"<{count}{SCALARS[item]}", self.data, self.take(count * size)))
        count = self.count(8 if item == STRING else 12, "values")
        return [self.value(item, depth + 1) for _ in range(count)]

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """Metadata and tensor table."""
        magic = self.data[self.take(4) : 4]
        if magic != b"GGUF":
            self.fail(f"it starts with {magic!r}, a GGUF file with b'GGUF'")
        version = self.number("I")
        if version not in (2, 3):
            hint = " (big endian; convert it)" if version in (2 << 24, 3 << 24) else ""
            self.fail(f"GGUF version {version}{hint}; versions 2 and 3 are supported")
        tensor_count = self.count(8 + 4 + 8 + 4 + 8, "tensors")
        pair_count = self.count(8 + 4 + 1, "metadata pairs")
        metadata: dict[str, Any] = {}
        for i in range(pair_count):
            self.what = f"metadata pair {i}"
            key = self.string()
            if key in metadata:
                self.fail(f"the key {key!r} comes twice")
            self.what = f"metadata {key!r}"
            metadata[key] = self.value(self.number("I"))
        entries = {}
        for i in range(tensor_count):
            self.what = f"the entry of tensor {i}"
            name = self.string()
            if name in entries:
                self.fail(f"the tensor name {name!r} comes twice")
            self.what = f"the entry of tensor {name!r}"
            entries[name] = self.entry()
        return metadata, self.place(entries, metadata.get("general.alignment", 32))

    def entry(self) -> tuple[tuple[int, ...], GGMLQuantizationType, int, int]:
        """Shape, type, size in bytes and offset of one tensor."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.fail(f"{dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        sizes = [self.number("Q") for _ in range(dimensions)]
        number = self.number("I")
        names = ", ".join(sorted(kind.name for kind in TYPES))
        if number not in TYPES:
            known = [kind.name for kind in GGMLQuantizationType if kind == number]
            self.fail(f"tensor type {(known or [number])[0]} cannot be decoded; supported: {names}")
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        elements = math.prod(sizes)
        if elements == 0 or sizes[0] % block:
            self.fail(f"sizes {sizes} do not divide into {kind.name} blocks of {block}")
        return tuple(reversed(sizes)), kind, elements // block * block_bytes, self.number("Q")

    def place(
        self, entries: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int, int]], alignment: Any
    ) -> dict[str, TensorInfo]:
        """Checks that every tensor lies whole inside the file, aligned, and that no two overlap."""
        self.what = "metadata 'general.alignment'"
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            self.fail(f"the alignment is {alignment!r}; a power of two from 8 to 2^20 is allowed")
        data_start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (shape, kind, size, offset) in entries.items():
            self.what, self.at = f"tensor {name!r}", data_start + offset
            if offset % alignment:
                self.fail(f"its offset {offset} is not a multiple of the alignment {alignment}")
            if self.at + size > len(self.data):
                self.fail(f"it takes {size} bytes ({shape} in {kind.name}) and the file ends at {len(self.data)}")
            tensors[name] = TensorInfo(shape, kind, self.at, size)
        by_place = sorted(tensors.items(), key=lambda item: item[1].start)
        for (_, before), (name, after) in itertools.pairwise(by_place):
            if before.start + before.size > after.start:
                self.what, self.at = f"tensor {name!r}", after.start
                self.fail("it overlaps the tensor before it")
        return tensors

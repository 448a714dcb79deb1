"""ONNX, a graph of operations with its weights, read without the `onnx` package.

An ONNX file is a Protocol Buffers message: a sequence of fields, each a key and a value, and nothing around them.

    key = number << 3 | type      as a varint: 7 bits per byte, the lowest first, the eighth bit says "one more"
    type 0  varint        type 1  8 bytes        type 2  length (varint), then that many bytes        type 5  4 bytes

A value of type 2 is text, bytes, packed numbers or another message; only the schema tells which. That is all of the
format, so the three messages that hold weights (graph, node, tensor: onnx/onnx.proto) are read here in a page, where
the package would bring a code generator's runtime along. Every length is a stranger's claim and checked against what
holds it; tensors that point to other files (external_data) are refused.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from bildung.core.errors import ModelFileError

# Numbers of the fields that are read (onnx.proto).
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_OUTPUT, NODE_OP, NODE_ATTRIBUTE = 1, 2, 4, 5
ATTRIBUTE_TENSOR = 5
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_INTS, TENSOR_NAME = 1, 2, 4, 7, 8
TENSOR_RAW, TENSOR_EXTERNAL, TENSOR_LOCATION = 9, 13, 14
# TensorProto.DataType -> numpy's
TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}
FLOAT, INT64 = 1, 7
MAX_DIMENSIONS = 8
MAX_ENTRIES = 1_000_000  # nodes, or weights; the largest models have some tens of thousands


@dataclass(frozen=True)
class Node:
    """One operation of the graph: it reads and writes values by name. `value` is that of a Constant."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    value: Tensor | None = None


@dataclass
class Graph:
    """Operations in the order they run, and the weights they read."""

    path: Path
    nodes: list[Node]
    tensors: dict[str, Tensor]


def read_onnx(path: str | Path) -> Graph:
    """The graph of an .onnx file; its weights are views of the file. Raises ModelFileError for a damaged one."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private and writable: torch asks for it
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelFileError(f"{path} cannot be opened as an ONNX file: {error}") from error
    return _Reader(path).graph(memoryview(data))


class _Reader:
    def __init__(self, path: Path):
        self.path = path

    def fail(self, problem: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: {problem}; the file is truncated, damaged or not an ONNX model.")

    def varint(self, data: memoryview, at: int) -> tuple[int, int]:
        """(value, where it ends)."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                self.fail("it ends in the middle of a number")
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
        self.fail("a number is longer than 64 bits")

    def fields(self, data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """(number, value) of each field of a message: a number for type 0, else the bytes."""
        at = 0
        while at < len(data):
            key, at = self.varint(data, at)
            kind = key & 7
            if kind == 0:
                value, at = self.varint(data, at)
                yield key >> 3, value
                continue
            if kind not in (1, 2, 5):
                self.fail(f"a field has the unknown type {kind}")
            length, at = self.varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            if length > len(data) - at:
                self.fail(f"a field claims {length} bytes and {len(data) - at} are left")
            yield key >> 3, data[at : at + length]
            at += length

    def text(self, value: int | memoryview) -> str:
        try:
            return bytes(self.block(value)).decode()
        except UnicodeDecodeError:
            self.fail("a name is not UTF-8")

    def block(self, value: int | memoryview) -> memoryview:
        if isinstance(value, int):
            self.fail("a number stands where text or a message is expected")
        return value

    def graph(self, data: memoryview) -> Graph:
        found = [value for number, value in self.fields(data) if number == MODEL_GRAPH]
        if len(found) != 1:
            self.fail(f"it holds {len(found)} graphs")
        nodes: list[Node] = []
        tensors: dict[str, Tensor] = {}
        for number, value in self.fields(self.block(found[0])):
            if len(nodes) + len(tensors) > MAX_ENTRIES:
                self.fail(f"it has more than {MAX_ENTRIES} nodes and tensors")
            if number == GRAPH_NODE:
                nodes.append(self.node(self.block(value)))
            elif number == GRAPH_INITIALIZER:
                name, tensor = self.tensor(self.block(value))
                if name in tensors:
                    self.fail(f"it has two tensors called {name!r}")
                tensors[name] = tensor
        return Graph(self.path, nodes, tensors)

    def node(self, data: memoryview) -> Node:
        inputs, outputs, op, constant = [], [], "", None
        for number, value in self.fields(data):
            if number == NODE_INPUT:
                inputs.append(self.text(value))
            elif number == NODE_OUTPUT:
                outputs.append(self.text(value))
            elif number == NODE_OP:
                op = self.text(value)
            elif number == NODE_ATTRIBUTE:
                for inner, attribute in self.fields(self.block(value)):
                    if inner == ATTRIBUTE_TENSOR:
                        constant = self.tensor(self.block(attribute))[1]
        return Node(op, tuple(inputs), tuple(outputs), constant if op == "Constant" else None)

    def tensor(self, data: memoryview) -> tuple[str, Tensor]:
        name, kind, sizes = "", 0, list[int]()
        raw: dict[int, list[memoryview]] = {}
        for number, value in self.fields(data):
            if number == TENSOR_NAME:
                name = self.text(value)
            elif number == TENSOR_TYPE:
                kind = value if isinstance(value, int) else self.fail("a tensor's type is no number")
            elif number == TENSOR_DIMS:
                sizes += [value] if isinstance(value, int) else self.packed_varints(value)
            elif number == TENSOR_EXTERNAL or (number == TENSOR_LOCATION and value):
                raise ModelFileError(f"{self.path}: tensor {name!r} lies in another file; that is not supported.")
            elif number in (TENSOR_RAW, TENSOR_FLOATS):
                raw.setdefault(number, []).append(self.block(value))
            elif number == TENSOR_INTS:
                numbers = [value] if isinstance(value, int) else self.packed_varints(value)
                raw.setdefault(TENSOR_INTS, []).append(memoryview(np.array(numbers, "<u8").tobytes()))
        return name, self.array(name, kind, sizes, raw)

    def array(self, name: str, kind: int, sizes: list[int], raw: dict[int, list[memoryview]]) -> Tensor:
        """The tensor out of its bytes: raw_data, or the lists of a type of their own that small tensors may use."""
        if kind not in TYPES:
            self.fail(f"tensor {name!r} has the data type {kind}, which is not one of {', '.join(map(str, TYPES))}")
        if len(sizes) > MAX_DIMENSIONS or len(raw) > 1:
            self.fail(f"tensor {name!r} has {len(sizes)} dimensions and {len(raw)} lists of values")
        wanted = {TENSOR_FLOATS: FLOAT, TENSOR_INTS: INT64}
        parts = [part for number, found in raw.items() for part in found if wanted.get(number, kind) == kind]
        dtype = np.dtype(TYPES[kind])
        block = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        count = math.prod(sizes)  # a negative size is a varint of 2^64 - n, far beyond any file
        if len(block) != count * dtype.itemsize:
            self.fail(f"tensor {name!r} of shape {sizes} has {len(block)} bytes")
        if not count:
            return torch.empty(sizes)
        values = np.frombuffer(block, dtype).reshape(sizes)
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def packed_varints(self, data: memoryview) -> list[int]:
        numbers, at = [], 0
        while at < len(data):
            number, at = self.varint(data, at)
            numbers.append(number)
        return numbers

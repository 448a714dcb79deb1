"""A small ONNX file, written byte by byte: the names and the shape of the graph that torch.onnx makes of a DINOv2."""

from __future__ import annotations

import torch
from torch import Tensor

Field = tuple[int, "int | bytes"]


def varint(value: int) -> bytes:
    value &= 2**64 - 1  # a negative number is written as its complement
    done = b""
    while value > 127:
        done += bytes([value & 127 | 128])
        value >>= 7
    return done + bytes([value])


def message(*fields: Field) -> bytes:
    """A Protocol Buffers message of (number, whole number or bytes)."""
    done = b""
    for number, value in fields:
        if isinstance(value, int):
            done += varint(number << 3) + varint(value)
        else:
            done += varint(number << 3 | 2) + varint(len(value)) + value
    return done


def tensor(name: str, values: Tensor) -> bytes:
    kind, cast = (7, torch.int64) if not values.is_floating_point() else (1, torch.float32)
    raw = values.to(cast).contiguous().numpy().tobytes()
    return message(*((1, size) for size in values.shape), (2, kind), (8, name.encode()), (9, raw))


def node(op: str, inputs: list[str], output: str, value: Tensor | None = None) -> bytes:
    fields: list[Field] = [(1, name.encode()) for name in inputs]
    fields += [(2, output.encode()), (4, op.encode())]
    if value is not None:
        fields.append((5, message((1, b"value"), (5, tensor("", value)))))
    return message(*fields)


def model(nodes: list[bytes], tensors: list[bytes]) -> bytes:
    """ModelProto with opset 14."""
    graph = message(*((1, one) for one in nodes), (2, b"main_graph"), *((5, one) for one in tensors))
    return message((1, 7), (2, b"pytorch"), (7, graph), (8, message((2, 14))))


def exported(state: dict[str, Tensor], heads: int, eps: float, prefix: str = "backbone.") -> bytes:
    """What torch.onnx makes of a Dinov2Model's tensors: matrices transposed and nameless, positions in two pieces."""
    nodes: list[bytes] = []
    tensors = []
    for number, (name, values) in enumerate(state.items()):
        own, place = prefix + name, f"/{name.removesuffix('.weight')}"
        if name.endswith("position_embeddings"):
            tensors += [tensor("onnx::Concat_9", values[:, :1]), tensor("onnx::Reshape_8", values[:, 1:])]
        elif name.endswith(".weight") and values.ndim == 2:
            tensors.append(tensor(f"onnx::MatMul_{number}", values.t()))
            nodes.append(node("MatMul", ["/x", f"onnx::MatMul_{number}"], f"{place}/MatMul_output_0"))
            bias = own.removesuffix("weight") + "bias"
            inputs = [bias, f"{place}/MatMul_output_0"]  # torch puts the bias first; adding commutes
            nodes.append(node("Add", inputs if number % 2 else inputs[::-1], f"{place}/Add_output_0"))
        elif not name.endswith("mask_token"):
            tensors.append(tensor(own, values))
    size = state["embeddings.cls_token"].shape[-1]
    query = "/encoder.layer.0.attention.attention.query/Add_output_0"
    nodes += [
        node("Constant", [], "/heads", torch.tensor([heads])),
        node("Constant", [], "/head_size", torch.tensor([size // heads])),
        node("Concat", ["/batch", "/length", "/heads", "/head_size"], "/shape"),
        node("Reshape", [query, "/shape"], "/q"),
        node("Constant", [], "/eps", torch.tensor(eps)),
        node("Add", ["/variance", "/eps"], "/variance_eps"),
        node("Sqrt", ["/variance_eps"], "/deviation"),
    ]
    tensors.append(tensor("decoder.final_conv.weight", torch.randn(1, size, 1, 1)))
    return model(nodes, tensors)

"""A DINOv2 inside an ONNX graph as Hugging Face would have it: config.json and tensors under Hugging Face names.

torch.onnx keeps the names of biases, norms and tokens, but a Linear's matrix becomes the second input of a MatMul,
transposed and called onnx::MatMul_1966. What it was is said by the bias that is added next:

    x ─ MatMul(onnx::MatMul_1966) ─ Add(...layer.0.attention.attention.key.bias)    so 1966 is key.weight, transposed

The class token's position and the others' lie in two pieces, because the graph stretches the latter. Sizes that are in
no tensor's shape (heads, eps) are constants in the graph. What stands on top of the model (a decoder, say) is left out,
and named.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import ModelFileError
from bildung.model.onnx_reader import Graph, Node, read_onnx

__all__ = ["PREPROCESSING", "Graph", "hf_config", "hf_state_dict", "left_out", "read_onnx"]

TOKEN, PROJECTION = "embeddings.cls_token", "embeddings.patch_embeddings.projection.weight"
POSITIONS = "embeddings.position_embeddings"

# No graph says how its input is made of pixels. These are DINOv2's numbers, ImageNet's mean and deviation.
PREPROCESSING: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def hf_config(graph: Graph) -> dict[str, Any]:
    """config.json of the Dinov2Model in the graph. Raises ModelFileError when there is none."""
    tensors, prefix = hf_state_dict(graph), _prefix(graph)
    size, channels, patch, _ = tensors[PROJECTION].shape
    inner = tensors.get("encoder.layer.0.mlp.fc1.bias", tensors[TOKEN].new_empty(0)).numel()
    layers = {int(match[1]) for name in tensors if (match := re.match(r"encoder\.layer\.(\d{1,4})\.", name))}
    side = math.isqrt(tensors[POSITIONS].shape[1] - 1)
    if not inner or inner % size or layers != set(range(len(layers))) or side**2 != tensors[POSITIONS].shape[1] - 1:
        raise _not_dinov2(graph)
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": _heads(graph, prefix, size),
        "mlp_ratio": inner // size,
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "layer_norm_eps": _eps(graph),
        "use_mask_token": False,  # nothing in a graph for use reads it
        "use_swiglu_ffn": False,
        "qkv_bias": True,
    }


def hf_state_dict(graph: Graph) -> dict[str, Tensor]:
    """Its tensors under the names of a Dinov2Model's file. Raises ModelFileError when it is not one."""
    prefix = _prefix(graph)
    found = {name.removeprefix(prefix): tensor for name, tensor in graph.tensors.items() if _inside(name, prefix)}
    for anonymous, bias in _matrices(graph).items():
        if _inside(bias, prefix):
            found[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = graph.tensors[anonymous].t()
    if POSITIONS not in found:
        found[POSITIONS] = torch.cat([graph.tensors[name] for name in _positions(graph, prefix)], dim=1)
    if found.get(PROJECTION, found[TOKEN]).ndim != 4 or found[TOKEN].ndim != 3:
        raise _not_dinov2(graph)
    return found


def left_out(graph: Graph) -> list[str]:
    """Names of the weights that are not the model's."""
    prefix, matrices = _prefix(graph), _matrices(graph)
    used = {name for name, bias in matrices.items() if _inside(bias, prefix)} | set(_positions(graph, prefix))
    return [name for name in graph.tensors if not _inside(name, prefix) and name not in used]


def _prefix(graph: Graph) -> str:
    """What stands before the model's own names, "backbone." for instance."""
    tokens = [name for name in graph.tensors if name.endswith(TOKEN)]
    if len(tokens) != 1 or tokens[0].removesuffix(TOKEN) + PROJECTION not in graph.tensors:
        raise _not_dinov2(graph)
    return tokens[0].removesuffix(TOKEN)


def _inside(name: str, prefix: str) -> bool:
    return name.startswith(tuple(f"{prefix}{part}." for part in ("embeddings", "encoder", "layernorm")))


def _matrices(graph: Graph) -> dict[str, str]:
    """The name of a matrix without one -> the name of the bias that is added to its product."""
    product = {
        node.outputs[0]: node.inputs[1] for node in graph.nodes if node.op == "MatMul" and _is_matrix(graph, node)
    }
    found = {}
    for node in graph.nodes:
        if node.op == "Add" and len(node.inputs) == 2:
            for one, other in (node.inputs, node.inputs[::-1]):
                if one in product and other in graph.tensors and other.endswith(".bias"):
                    found[product[one]] = other
    return found


def _is_matrix(graph: Graph, node: Node) -> bool:
    tensor = graph.tensors.get(node.inputs[1]) if len(node.inputs) == 2 and node.outputs else None
    return tensor is not None and tensor.ndim == 2


def _positions(graph: Graph, prefix: str) -> list[str]:
    """The class token's position and the table of the patches', where the file has them apart."""
    if prefix + POSITIONS in graph.tensors:
        return []
    size = graph.tensors[prefix + TOKEN].shape[-1]
    table = [name for name, tensor in graph.tensors.items() if tensor.ndim == 3 and tensor.shape[-1] == size]
    own = [name for name in table if graph.tensors[name].shape[:2] == (1, 1) and not name.endswith(TOKEN)]
    grid = [name for name in table if graph.tensors[name].shape[0] == 1 and graph.tensors[name].shape[1] > 1]
    if len(own) != 1 or len(grid) != 1:
        raise _not_dinov2(graph)
    return [own[0], grid[0]]


def _heads(graph: Graph, prefix: str, size: int) -> int:
    """The first layer's queries are reshaped to (batch, length, heads, size of a head); the last two are constants."""
    made = {node.outputs[0]: node for node in graph.nodes if node.outputs}
    bias = f"{prefix}encoder.layer.0.attention.attention.query.bias"
    queries = {node.outputs[0] for node in graph.nodes if node.op == "Add" and bias in node.inputs and node.outputs}
    for node in graph.nodes:
        if node.op == "Reshape" and node.inputs and node.inputs[0] in queries and len(node.inputs) > 1:
            shape = made.get(node.inputs[1])
            parts = [made.get(name) for name in shape.inputs[-2:]] if shape is not None else []
            numbers = [int(part.value) for part in parts if part and part.value is not None and part.value.numel() == 1]
            if len(numbers) == 2 and numbers[0] * numbers[1] == size:
                return numbers[0]
    raise _not_dinov2(graph)


def _eps(graph: Graph) -> float:
    """A norm is spelt out in older operator sets: Sqrt(variance + eps)."""
    made = {node.outputs[0]: node for node in graph.nodes if node.outputs}
    for node in graph.nodes:
        if node.op == "Sqrt" and node.inputs and (added := made.get(node.inputs[0])) and added.op == "Add":
            constants = [made[name].value for name in added.inputs if name in made]
            numbers = [float(value) for value in constants if value is not None and value.numel() == 1]
            if numbers:
                return float(f"{numbers[0]:.6g}")  # 1e-06 is stored as 9.999999974752427e-07
    return 1e-6


def _not_dinov2(graph: Graph) -> ModelFileError:
    some = ", ".join(list(graph.tensors)[:3]) or "none"
    return ModelFileError(
        f"{graph.path} holds no DINOv2 as Hugging Face names it ({len(graph.tensors)} tensors: {some} ...); of ONNX "
        f"files only these are read."
    )

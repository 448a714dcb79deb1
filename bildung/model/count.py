"""What a model costs, counted and not measured: the parameters and the multiply-adds of every part.

One Transformer layer on n tokens, width d, feed-forward 4 d, as many key-value heads as heads:

    q, k, v        3 n d²
    scores           n² d        every query with every key
    mixing           n² d        every probability with every value
    out              n d²
    feed-forward   8 n d²

Every weight matrix is multiplied once per token; with grouped queries, windows, gates or an encoder beside it the terms
follow from the shapes. All n² pairs count, the masked half too. Left out is what grows only with n d or n² (norms,
activations, softmax, rotation), and looking up embeddings. A multiply-add is two floating-point operations; training
takes three times as many as a forward pass (the backward pass two: for the inputs and for the weights).
"""

# n tokens, s source tokens or keys, d hidden_size, I input features, O output features, N heads, H head dim

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from bildung.model.alignment import Alignment
from bildung.model.attention import Attention, CrossAttention
from bildung.model.base import Model
from bildung.model.build import make
from bildung.model.config import BaseConfig
from bildung.model.linear import Linear

ONE_VECTOR = ("pooler", "nsp_head", "classifier", "bridge")  # read one state, or a pooled one
SUBLAYERS = {"self_attn": "attn", "cross_attn": "cross", "mlp": "mlp"}
LEAVES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "out", "sinks_N": "scores"}
LAYER = re.compile(r"^(?:model\.|(encoder\.|decoder\.))?layers\.(\d+)\.(.+)$")


@dataclass
class Part:
    """One part of a model. `name` as in the list of sites: "layers.3.attn.qkv", "decoder.layers.0.mlp", "lm_head"."""

    name: str
    shape: str = ""  # "768 -> 768 + 256 + 256"
    parameters: int = 0
    delta_parameters: int = 0  # of deltas on its matrices
    multiply_adds: int = 0  # of one forward pass of one row


def on_paper(config: BaseConfig) -> Model:
    """The model without its numbers: nothing is allocated, however large it is."""
    with torch.device("meta"):
        model: Model = make(config)
    model.tie()
    return model


def count(model: Model, length: int, source_length: int | None = None) -> list[Part]:
    """The parts in forward order, for one row of `length` tokens (of a model of images: as many as its patches make).

    source_length: tokens of an encoder-decoder's source (default: as many). A tied unembedding has no parameters of its
    own; quantized matrices count the weights they stand for.
    """
    tokens = Tokens(model.config, length, length if source_length is None else source_length)
    parts: dict[str, Part] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if ".deltas" in path or ".virtual" in path or path.startswith("attached"):
            continue
        if isinstance(module, Linear):
            if path.endswith("attn.o_proj"):
                _add_attention(parts, path, model, tokens)
            _add_linear(parts.setdefault(part_of(path), Part(part_of(path))), path, module, tokens, seen)
        elif isinstance(module, Alignment):
            _add_alignment(parts, path, module, tokens)
        elif not path.endswith(".base"):
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    name = part_of(f"{path}.{leaf}" if path else leaf)
                    part = parts.setdefault(name, Part(name, shape=_shape(parameter)))
                    part.parameters += parameter.numel()
    return list(parts.values())


def totals(parts: list[Part]) -> tuple[int, int]:
    """(parameters, multiply-adds) of the whole."""
    return sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts)


def cache_bytes(config: Any, length: int, element_bytes: int = 2) -> int:
    """What keys and values of so many tokens take per row: 2 · layers · K heads · length · head_dim · bytes."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(per_token * length * element_bytes)


@dataclass(frozen=True)
class Tokens:
    """How many vectors each matrix is multiplied with."""

    config: Any
    length: int
    source: int

    def through(self, path: str) -> int:
        """For the matrix at that module path."""
        if path.split(".")[0] in ONE_VECTOR:
            return 1
        if self.config.kind == "vision":
            return self.patches if "patch_embed" in path else self.queries(path)
        if path.endswith("cross.v_proj"):  # of additive attention: a number for every pair
            return self.length * self.source
        if path.startswith("encoder.") or re.search(r"cross_attn\.[kv]_proj$|cross\.key_proj$", path):
            return self.source
        return self.length

    def queries(self, path: str) -> int:
        """Tokens that the attention at that path lets ask."""
        if self.config.kind == "vision":
            return self.patches + 1 + int(self.config.image.registers)
        return self.source if path.startswith("encoder.") else self.length

    def keys(self, path: str, layer: int, crosses: bool) -> int:
        """Keys that each of them is compared with: no more than a window holds."""
        if crosses:
            return self.source
        config = self.config.encoder if path.startswith("encoder.") and self.config.encoder else self.config
        window = config.windows[layer]
        return self.queries(path) if window is None else min(window, self.queries(path))

    @property
    def patches(self) -> int:
        rows, columns = self.config.image.grid
        return int(rows * columns)


def part_of(path: str) -> str:
    """The part that a module or parameter belongs to."""
    found = LAYER.match(path)
    if found is None:
        return re.sub(r"\.(weight|bias)$", "", path.removeprefix("model."))
    prefix, layer, rest = found.group(1) or "", found.group(2), found.group(3)
    words = rest.split(".")
    name = SUBLAYERS.get(words[0])
    if name is None:
        return f"{prefix}layers.{layer}.{'norms' if 'norm' in words[0] else words[0]}"
    if name != "mlp":
        name = f"{name}.{LEAVES.get(words[1], 'norms')}"
    return f"{prefix}layers.{layer}.{name}"


def _add_linear(part: Part, path: str, linear: Linear, tokens: Tokens, seen: set[int]) -> None:
    weights, rows = linear.in_features * linear.out_features, tokens.through(path)
    shared = [id(parameter) for parameter in linear.base.parameters(recurse=False)]
    part.parameters += 0 if shared and shared[0] in seen else weights
    seen.update(shared)
    if linear.bias is not None:
        part.parameters += linear.bias.numel()
        seen.add(id(linear.bias))
    deltas = sum(parameter.numel() for parameter in linear.deltas.parameters())
    part.delta_parameters += deltas
    part.multiply_adds += rows * (weights + deltas)
    arrow = f"{linear.in_features} → "
    more = f" + {linear.out_features}" if part.shape.startswith(arrow) else f", {arrow}{linear.out_features}"
    part.shape = part.shape + more if part.shape else f"{arrow}{linear.out_features}"


def _add_attention(parts: dict[str, Part], path: str, model: Model, tokens: Tokens) -> None:
    module = cast(Attention, model.get_submodule(path.rpartition(".")[0]))
    crosses = isinstance(module, CrossAttention)
    pairs = tokens.queries(path) * tokens.keys(path, module.layer, crosses)
    inner = module.q_proj.out_features  # N · H
    for word in ("scores", "mixing"):
        name = part_of(path).replace(".out", f".{word}")
        part = parts.setdefault(name, Part(name))
        part.shape = f"{inner // module.head_dim} heads × {module.head_dim}"
        part.multiply_adds += pairs * inner


def _add_alignment(parts: dict[str, Part], path: str, module: Alignment, tokens: Tokens) -> None:
    """The attention of a recurrent decoder: one head, over the states themselves."""
    pairs, config = tokens.length * tokens.source, tokens.config
    if module.v_proj is None:
        parts[f"{path}.scores"] = Part(f"{path}.scores", f"1 × {config.hidden_size}", 0, 0, pairs * config.hidden_size)
    parts[f"{path}.mixing"] = Part(f"{path}.mixing", f"1 × {config.memory_size}", 0, 0, pairs * config.memory_size)


def _shape(parameter: nn.Parameter) -> str:
    return " × ".join(str(size) for size in parameter.shape)

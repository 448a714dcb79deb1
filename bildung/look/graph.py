"""A Transformer as a graph: who reads what whom wrote into the residual stream.

    senders    embed, every head (a0.h0), every MLP (m0)      what each adds to the stream
    receivers  a1.h0.q, a1.h0.k, a1.h0.v, m1, logits          what each reads: the sum of all senders below it

(Elhage et al. 2021; edges between heads with separate q, k and v inputs as in Conmy et al. 2023.) In a grouped-query
model the key and value inputs belong to a key-value head (a1.kv0.k), which several heads share: cutting it cuts it for
all of them.
"""

# U senders, R receivers

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bildung.core.errors import SettingsError, nearest
from bildung.model.transformer import Decoder


@dataclass(frozen=True)
class Graph:
    """Names and order of senders and receivers. parallel: a layer's MLP does not read its own heads (GPT-J, NeoX)."""

    layers: int
    heads: int
    kv_heads: int
    parallel: bool = False
    mlps: bool = True  # False: attention alone

    @cached_property
    def senders(self) -> list[str]:
        names = ["embed"]
        for n in range(self.layers):
            names += [f"a{n}.h{h}" for h in range(self.heads)] + [f"m{n}"] * self.mlps
        return names

    @cached_property
    def receivers(self) -> list[str]:
        group = "h" if self.kv_heads == self.heads else "kv"
        names: list[str] = []
        for n in range(self.layers):
            names += [f"a{n}.h{h}.q" for h in range(self.heads)]
            names += [f"a{n}.{group}{h}.{word}" for word in "kv" for h in range(self.kv_heads)]
            names += [f"m{n}"] * self.mlps
        return [*names, "logits"]

    @cached_property
    def below(self) -> list[int]:
        """For every receiver, how many senders (the first of the list) it reads."""
        count = []
        for n in range(self.layers):
            before = self.rows(n).start
            count += [before] * (self.heads + 2 * self.kv_heads)
            count += [before if self.parallel else before + self.heads] * self.mlps
        return [*count, len(self.senders)]

    @cached_property
    def allowed_UR(self) -> Tensor:
        """True where there is an edge."""
        return torch.arange(len(self.senders))[:, None] < torch.tensor(self.below)[None]

    def columns(self, layer: int, word: str) -> slice:
        """The receivers "q", "k", "v" or "m" of a layer."""
        widths = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "m": int(self.mlps)}
        start = layer * sum(widths.values())
        for name, width in widths.items():
            if name == word:
                return slice(start, start + width)
            start += width
        raise KeyError(word)

    def rows(self, layer: int) -> slice:
        """The senders that are heads of a layer."""
        start = 1 + layer * (self.heads + self.mlps)
        return slice(start, start + self.heads)

    def nodes_of(self, receiver: str) -> list[str]:
        """The senders that a receiver's input goes into: a head, all heads of a key-value head, an MLP."""
        if receiver == "logits":
            return []
        if receiver.startswith("m"):
            return [receiver]
        layer, head, _ = receiver.split(".")
        if not head.startswith("kv"):
            return [f"{layer}.{head}"]
        group = self.heads // self.kv_heads
        return [f"{layer}.h{int(head[2:]) * group + one}" for one in range(group)]

    def inputs_of(self, sender: str) -> list[str]:
        """The receivers whose input goes into a sender: a head's q, k and v."""
        return [receiver for receiver in self.receivers if sender in self.nodes_of(receiver)]

    def index(self, sender: str, receiver: str) -> tuple[int, int]:
        """Where an edge stands in a matrix UR. Raises SettingsError for a node or an edge that there is not."""
        for name, names in ((sender, self.senders), (receiver, self.receivers)):
            if name not in names:
                raise SettingsError(f"no node {name!r} in this model's graph. {nearest(name, names)}".strip())
        u, r = self.senders.index(sender), self.receivers.index(receiver)
        if not self.allowed_UR[u, r]:
            raise SettingsError(f"no edge {sender} -> {receiver}: {sender} writes after {receiver} has read.")
        return u, r


def graph_of(model: nn.Module) -> Graph:
    """The graph of a decoder. Raises SettingsError for a model whose stream is not a sum of what its parts write."""
    if not isinstance(model, Decoder):
        raise SettingsError(
            f"a {type(model).__name__} has no graph of edges; pre-norm decoders have (Llama, GPT-2...)."
        )
    config, why = model.config, ""
    if config.norm_placement != "pre":
        why = f"its norms stand {config.norm_placement}: what a part writes is normalised with what others wrote"
    elif config.layer_scale is not None or config.norm == "batch":
        why = "it has layer scales or batch norms"
    elif model.attached:
        why = "modules are attached to it, which change what its parts write; merge or detach them"
    if why:
        raise SettingsError(f"edges need a stream that is the sum of its parts; not so in this model: {why}.")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return Graph(config.num_hidden_layers, heads, kv_heads, config.parallel_residual, config.mlp)

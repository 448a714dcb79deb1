"""A Transformer as a graph: who reads what whom wrote into the residual stream.

    senders    embed, every head (a0.h0), every MLP (m0)      what each adds to the stream
    receivers  a1.h0.q, a1.h0.k, a1.h0.v, m1, logits          what each reads: the sum of all senders below it

(Elhage et al. 2021; edges between heads with separate q, k and v inputs as in Conmy et al. 2023.) In a grouped-query
model the key and value inputs belong to a key-value head (a1.kv0.k), which several heads share: cutting it cuts it for
all of them.

An encoder-decoder has two streams. The encoder's parts have an e. before their names (e.embed, e.a0.h0, e.m0); the
decoder's heads that look at the source are c0.h0. Their q reads the decoder's stream, their k and v the encoder's:

    e.a1.h0 -> c0.h2.k        e.m1 -> c0.h2.v        a0.h1 -> c0.h2.q        c0.h2 -> m0
"""

# U senders, R receivers

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import SettingsError, nearest
from bildung.look.asked import whole_of
from bildung.model.transformer import Backbone

Span = tuple[int, int]
Place = tuple[str, int, str]  # "e." or "", layer, "a" for heads, "c" for those that look at a source, "m"


@dataclass(frozen=True)
class _Order:
    """Names in order, where each group of them stands, and the range of senders that each receiver reads."""

    senders: list[str]
    receivers: list[str]
    reads: list[tuple[int, int]]
    rows: dict[Place, slice]
    columns: dict[Place, slice]


@dataclass(frozen=True)
class Graph:
    """Names and order of senders and receivers. parallel: a layer's MLP does not read its own heads (GPT-J, NeoX).
    encoder: of an encoder-decoder, whose decoder this then is."""

    layers: int
    heads: int
    kv_heads: int
    parallel: bool = False
    mlps: bool = True  # False: attention alone
    encoder: Graph | None = None

    @cached_property
    def _order(self) -> _Order:
        made = _Order([], [], [], {}, {})

        def write(place: Place, names: list[str]) -> None:
            made.rows[place] = slice(len(made.senders), len(made.senders) + len(names))
            made.senders.extend(names)

        def read(place: Place, names: list[str], span: Span) -> None:
            made.columns[place] = slice(len(made.receivers), len(made.receivers) + len(names))
            made.receivers.extend(names)
            made.reads.extend([span] * len(names))

        def attention(
            half: str, graph: Graph, n: int, kind: str, queries: tuple[int, int], keys: tuple[int, int]
        ) -> None:
            at, group = f"{half}{kind}{n}", "h" if graph.kv_heads == graph.heads else "kv"
            read((half, n, f"{kind}q"), [f"{at}.h{h}.q" for h in range(graph.heads)], queries)
            for word in "kv":
                read((half, n, kind + word), [f"{at}.{group}{h}.{word}" for h in range(graph.kv_heads)], keys)
            write((half, n, kind), [f"{at}.h{h}" for h in range(graph.heads)])

        source = (0, 0)
        for half, graph in self.halves.items():
            start = len(made.senders)
            write((half, -1, "embed"), [f"{half}embed"])
            for n in range(graph.layers):
                before = (start, len(made.senders))
                attention(half, graph, n, "a", before, before)
                if not half and self.encoder is not None:
                    attention(half, graph, n, "c", (start, len(made.senders)), source)
                if graph.mlps:
                    read((half, n, "m"), [f"{half}m{n}"], before if graph.parallel else (start, len(made.senders)))
                    write((half, n, "m"), [f"{half}m{n}"])
            source = (start, len(made.senders))
        read(("", self.layers, "logits"), ["logits"], source)
        return made

    @cached_property
    def halves(self) -> dict[str, Graph]:
        """What names begin with, and the stack of layers that is meant, in the order of the forward pass."""
        return {"": self} if self.encoder is None else {"e.": self.encoder, "": self}

    @cached_property
    def senders(self) -> list[str]:
        return self._order.senders

    @cached_property
    def receivers(self) -> list[str]:
        return self._order.receivers

    @cached_property
    def reads(self) -> list[tuple[int, int]]:
        """For every receiver the senders it reads: from the first to before the second."""
        return self._order.reads

    @cached_property
    def embeds(self) -> set[str]:
        """The senders that nothing stands below."""
        return {f"{half}embed" for half in self.halves}

    @cached_property
    def allowed_UR(self) -> Tensor:
        """True where there is an edge."""
        u_U1, reads_R2 = torch.arange(len(self.senders))[:, None], torch.tensor(self.reads)
        return (u_U1 >= reads_R2[:, 0]) & (u_U1 < reads_R2[:, 1])

    def columns(self, layer: int, word: str, half: str = "") -> slice:
        """The receivers of a layer: "aq", "ak", "av", "cq", "ck", "cv" or "m"."""
        return self._order.columns[half, layer, word]

    def rows(self, layer: int, kind: str = "a", half: str = "") -> slice:
        """The senders of a layer: heads "a", heads that look at the source "c", the MLP "m"; "embed" of layer -1."""
        return self._order.rows[half, layer, kind]

    def nodes_of(self, receiver: str) -> list[str]:
        """The senders that a receiver's input goes into: a head, all heads of a key-value head, an MLP."""
        if receiver == "logits":
            return []
        half = "e." if receiver.startswith("e.") else ""
        graph, name = self.halves[half], receiver.removeprefix(half)
        if name.startswith("m"):
            return [receiver]
        layer, head, _ = name.split(".")
        if not head.startswith("kv"):
            return [f"{half}{layer}.{head}"]
        group = graph.heads // graph.kv_heads
        return [f"{half}{layer}.h{int(head[2:]) * group + one}" for one in range(group)]

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


def is_mlp(name: str) -> bool:
    """Whether a sender or receiver is a feed-forward layer."""
    return name.removeprefix("e.").startswith("m")


def graph_of(model: nn.Module) -> Graph:
    """The graph of a model. Raises SettingsError for one whose stream is not a sum of what its parts write."""
    whole = whole_of(model)
    if not any(isinstance(part, Backbone) for part in whole.modules()):
        raise SettingsError(f"a {type(whole).__name__} has no graph of edges; Transformers that read text have.")
    why, encoder = "", getattr(whole.config, "encoder", None)
    for config in (whole.config, *([] if encoder is None else [encoder])):
        if config.norm_placement != "pre":
            why = f"its norms stand {config.norm_placement}: what a part writes is normalised with what others wrote"
        elif config.layer_scale is not None or config.norm == "batch":
            why = "it has layer scales or batch norms"
    if whole.attached:
        why = "modules are attached to it, which change what its parts write; merge or detach them"
    if why:
        raise SettingsError(f"edges need a stream that is the sum of its parts; not so in this model: {why}.")
    return _of(whole.config, None if encoder is None else _of(encoder))


def _of(config: Any, encoder: Graph | None = None) -> Graph:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return Graph(config.num_hidden_layers, heads, kv_heads, config.parallel_residual, config.mlp, encoder)

"""A circuit as a file: nodes and edges by name, on which model and how they were found, and what was measured.

    {"format": "bildung circuit 1", "model": {"sha256": ..., "architecture": {"num_hidden_layers": 30, ...}},
     "method": "eap_ig", "metric": "logit_difference", "ablation": "resample", "pairs": {...},
     "nodes": ["a0.h0", ...], "edges": [{"from": "embed", "to": "a0.h0.v", "score": -2.5}, ...], "measured": {...}}

Names mean something in one architecture only, so a file is refused by another, which says what differs. Other weights
of the same architecture (a tuned or quantized model) may be asked how much of a circuit they still use.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bildung.core.errors import DataError
from bildung.look.graph.edge_experiment import Edge
from bildung.look.graph.graph import Graph

FORMAT = "bildung circuit 1"
SHAPE = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")


@dataclass(frozen=True)
class Circuit:
    """Edges with their scores (None where the method gives none), and where they come from."""

    edges: dict[Edge, float | None]
    architecture: dict[str, Any]
    model_hash: str
    found: dict[str, Any] = field(default_factory=dict)  # method, metric, ablation, pairs, settings
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """The parts that have an edge: every sender, in the order of layers."""
        senders = {sender for sender, _ in self.edges}
        return sorted(senders, key=node_order)


ENCODER = 10_000  # an encoder's layers come before its decoder's


def node_order(node: str) -> tuple[int, int, int]:
    """Layer; attention 0, attention to a source 1, MLP 2; head. embed first, an encoder before all."""
    first, name = (-ENCODER, node[2:]) if node.startswith("e.") else (0, node)
    if name == "embed":
        return (first - 1, 0, 0)
    layer, _, head = name[1:].partition(".h")
    return (first + int(layer), "acm".index(name[0]), int(head or 0))


def architecture_of(config: Any) -> dict[str, Any]:
    """What must agree for names of heads and MLPs to mean the same parts."""
    shape = {key: getattr(config, key) for key in SHAPE} | {"mlp": bool(getattr(config, "mlp", True))}
    encoder = getattr(config, "encoder", None)
    return shape if encoder is None else shape | {"encoder": architecture_of(encoder)}


def save_circuit(circuit: Circuit, path: Path) -> None:
    """Write the file."""
    content = {
        "format": FORMAT,
        "model": {"sha256": circuit.model_hash, "architecture": circuit.architecture},
        **circuit.found,
        "nodes": circuit.nodes,
        "edges": [{"from": u, "to": r, "score": score} for (u, r), score in circuit.edges.items()],
        "measured": circuit.measured,
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def load_circuit(path: Path, graph: Graph, config: Any) -> Circuit:
    """Read a file for a model. Raises DataError for another architecture (naming what differs) or a broken file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{path}: the format is {content['format']!r}, {FORMAT!r} can be read.")
        model = content["model"]
        edges = {(str(edge["from"]), str(edge["to"])): edge.get("score") for edge in content["edges"]}
        architecture, model_hash = dict(model["architecture"]), str(model["sha256"])
    except OSError as error:
        raise DataError(f"{path}: no circuit file can be read there: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a circuit file ({type(error).__name__}: {error}).") from error
    here = architecture_of(config)
    differs = [
        f"{key} {architecture.get(key)!r} there, {here.get(key)!r} here"
        for key in dict.fromkeys((*architecture, *here))
        if architecture.get(key) != here.get(key)
    ]
    if differs:
        raise DataError(f"{path}: this circuit belongs to another architecture: {'; '.join(differs)}.")
    for sender, receiver in edges:
        graph.index(sender, receiver)
    found = {key: content[key] for key in content if key not in {"format", "model", "nodes", "edges", "measured"}}
    return Circuit(edges, architecture, model_hash, found, dict(content.get("measured", {})))

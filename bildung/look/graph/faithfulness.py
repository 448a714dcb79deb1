"""How good a circuit is: does it suffice, is it all there is, how small is it.

    F(C)            the metric with all edges outside C cut; recovered: 0 = as corrupted, 1 = as the whole model
    faithfulness    recovered F(C)                                     1: the circuit alone does what the model does
    without         recovered F(M \\ C), C cut and the rest left        0: nothing outside of it does the work
    incompleteness  mean over K of |F(C \\ K) - F(M \\ K)|, recovered; K: random halves of C's nodes, with all their
                    edges cut (Wang et al. 2022, section 4)            0: the circuit breaks as the model does
    minimality      the share of edges whose cut from C moves the recovered metric by 0.01 or more

Faithfulness does not grow steadily with the size: strong edges that work against the answer come in beside strong edges
that work for it. So a size is chosen by measuring, not by counting (`grown`).

`without` catches a circuit with a spare outside; `incompleteness` one with a spare that works only when others fail.
A faithfulness above 1 is no praise: the circuit has left out what works against the answer.
"""

# U senders, R receivers

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

from torch import Tensor

from bildung.look.causal.answer_metrics import recovered
from bildung.look.graph.edge_attribution import strongest
from bildung.look.graph.edge_experiment import Edge, EdgeExperiment

SMALL = 0.01


def measure_circuit(
    experiment: EdgeExperiment, edges: Collection[Edge], *, knockouts: int = 8, seed: int = 0, minimal: bool = False
) -> dict[str, Any]:
    """The figures above, by name. minimal: also one run per edge. Raises DataError if clean and corrupted agree."""
    graph, clean, corrupted = experiment.graph, experiment.clean, experiment.corrupted

    def share(cut_UR: Tensor) -> float:
        return float(recovered(experiment.value(cut_UR), clean, corrupted))

    outside_UR = experiment.keeping(edges)
    nodes = sorted({sender for sender, _ in edges} - graph.embeds)
    rng, gaps = random.Random(seed), []
    for _ in range(knockouts if nodes else 0):
        gone = rng.sample(nodes, max(1, len(nodes) // 2))
        knocked_UR = _cut_nodes(experiment, gone)
        gaps.append(abs(share((outside_UR + knocked_UR).clamp(max=1)) - share(knocked_UR)))
    parts = len(graph.senders) - len(graph.embeds)
    figures: dict[str, Any] = {
        "clean": clean,
        "corrupted": corrupted,
        "faithfulness": share(outside_UR),
        "without": share(experiment.cutting(edges)),
        "incompleteness": sum(gaps) / len(gaps) if gaps else None,
        "edges": len(edges),
        "edges_of": int(graph.allowed_UR.sum()),
        "nodes": len(nodes),
        "nodes_of": parts,
    }
    if minimal and edges:
        idle = 0
        for edge in edges:
            idle += abs(share(experiment.keeping(set(edges) - {edge})) - figures["faithfulness"]) < SMALL
        figures["minimality"] = 1 - idle / len(edges)
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in figures.items()}


def grown(
    experiment: EdgeExperiment, scores_UR: Tensor, first: int, share: float
) -> tuple[list[Edge], list[list[float]]]:
    """The circuit of the first, 2 first, 4 first... strongest edges that recovers `share`; [edges, share] of each try.

    All edges recover everything, so there is an end.
    """
    count, tried = max(first, 1), []
    while True:
        edges = strongest(experiment.graph, scores_UR, count)
        value = experiment.value(experiment.keeping(edges))
        tried.append([len(edges), round(float(recovered(value, experiment.clean, experiment.corrupted)), 4)])
        if tried[-1][1] >= share or count >= int(experiment.graph.allowed_UR.sum()):
            return edges, tried
        count *= 2


def _cut_nodes(experiment: EdgeExperiment, nodes: Collection[str]) -> Tensor:
    """The matrix that cuts all edges from some nodes."""
    cut_UR = experiment.no_cut()
    for node in nodes:
        row = experiment.graph.senders.index(node)
        cut_UR[row] = experiment.graph.allowed_UR[row].to(cut_UR)
    return cut_UR

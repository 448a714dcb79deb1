"""ACDC: cut every edge that is not missed, from the logits down (Conmy et al. 2023, arXiv 2304.14997, algorithm 1).

    for receiver r, from the logits to the first layer:
        for each sender u of r:
            cut u -> r (all that was cut before stays cut)
            leave it cut if the metric got worse by less than the threshold, otherwise put it back

By default the metric is KL to the whole model's prediction. Worse means more KL, or less of any other metric. A node
whose outgoing edges are all cut is left without a run: what it reads no longer matters. One run per edge: exact, and
only for small models, or for `candidates` found by something cheaper (edge_attribution.py); edges that are no
candidates are cut from the start.

The result depends on the order within a receiver; here senders go from the last to the first, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence

from bildung.core.errors import SettingsError
from bildung.core.progress import progress
from bildung.look.graph.edge_attribution import connected
from bildung.look.graph.edge_experiment import Edge, EdgeExperiment


def acdc(experiment: EdgeExperiment, threshold: float, candidates: Sequence[Edge] | None = None) -> list[Edge]:
    """The edges that stay. Raises SettingsError for a threshold that is not positive."""
    if threshold <= 0:
        raise SettingsError(f"threshold = {threshold}; it must be positive: what an edge must be worth to stay.")
    graph = experiment.graph
    allowed = graph.allowed_UR.to(experiment.model.device)
    cut_UR = experiment.no_cut() if candidates is None else experiment.keeping(candidates)
    worse = 1 if experiment.metric == "kl" else -1
    current = experiment.value(cut_UR)
    with progress("ACDC", int((allowed & (cut_UR == 0)).sum())) as bar:
        for r in reversed(range(len(graph.receivers))):
            receiver = graph.receivers[r]
            left = (cut_UR[:, r] == 0) & allowed[:, r]
            nodes = [graph.senders.index(node) for node in graph.nodes_of(receiver)]
            if nodes and not ((cut_UR[nodes] == 0) & allowed[nodes]).any():
                cut_UR[:, r] = allowed[:, r].to(cut_UR.dtype)
                bar.advance(int(left.sum()))
                continue
            for u in reversed(left.nonzero().flatten().tolist()):
                cut_UR[u, r] = 1
                value = experiment.value(cut_UR)
                if worse * (value - current) < threshold:
                    current = value
                else:
                    cut_UR[u, r] = 0
                bar.advance(1)
    kept = ((cut_UR == 0) & allowed).nonzero().tolist()
    return connected(graph, [(graph.senders[u], graph.receivers[r]) for u, r in kept])

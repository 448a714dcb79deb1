"""EAP and EAP-IG: a score for every edge of a model from a few backward passes.

    EAP      score(u -> r) = (other_u - clean_u) · d metric / d input_r         Syed et al. 2023, arXiv 2310.10348
    EAP-IG   the same, the gradient averaged over k = 1..m runs whose embeddings lie k/m of the way from the corrupted
             to the clean prompt                                                 Hanna et al. 2024, arXiv 2403.17806

The score is what cutting the edge would change in the metric, to first order; with the difference fixed, it is the
metric's gradient by how much of the edge is cut (edges.py). Where the clean run saturates a softmax the gradient there
vanishes, and EAP misses the edge; integrated gradients see what lies on the way. One step of EAP-IG is EAP.

The gradient of KL at the clean run is zero (it is at its minimum), so EAP with KL scores nothing: refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.look.causal.patching import frozen
from bildung.look.graph.edge_experiment import Edge, EdgeExperiment
from bildung.look.graph.graph import Graph


def edge_scores(experiment: EdgeExperiment, steps: int = 1) -> Tensor:
    """Scores UR of all edges, in the metric's units, negative where cutting the edge lowers it.

    steps: 1 is EAP, more is EAP-IG. Raises SettingsError for KL with one step.
    """
    if steps < 1:
        raise SettingsError(f"steps = {steps}; integrated gradients need at least 1.")
    if experiment.metric == "kl" and steps == 1:
        raise SettingsError("the gradient of KL is zero at the clean run; use EAP-IG, or another metric with EAP.")
    edges, total_UR = experiment.edges, experiment.no_cut()
    for side in experiment.sides:
        difference_UBLD = side.other_UBLD - side.clean_UBLD
        for step in range(1, steps + 1):
            # Both ends are the embeddings' own; between them the stream starts at a mixture.
            mixed = None if step == steps else side.other_UBLD[0] - difference_UBLD[0] * (step / steps)
            cut_UR = experiment.no_cut().requires_grad_()
            with torch.enable_grad(), frozen(experiment.model):
                logits_BV = edges.run_fixed(side.batch.clean_BL, cut_UR, difference_UBLD, mixed)
                metric = experiment.measure(side, logits_BV).sum()
                total_UR += torch.autograd.grad(metric, cut_UR)[0] / steps
    return total_UR / experiment.count


def strongest(graph: Graph, scores_UR: Tensor, count: int, least: float = 0.0) -> list[Edge]:
    """The edges of the `count` largest |scores| above `least`, without those that lead nowhere (see `connected`)."""
    size_UR = scores_UR.abs().cpu().masked_fill(~graph.allowed_UR, -1)
    order = size_UR.flatten().argsort(descending=True, stable=True)[: max(count, 0)]
    chosen = [divmod(int(index), size_UR.shape[1]) for index in order if size_UR.flatten()[index] > least]
    return connected(graph, [(graph.senders[u], graph.receivers[r]) for u, r in chosen])


def connected(graph: Graph, edges: list[Edge]) -> list[Edge]:
    """The edges on some way from the embedding to the logits; the others cannot carry anything from input to output."""
    while True:
        written = {node for _, receiver in edges for node in graph.nodes_of(receiver)} | graph.embeds
        read = {sender for sender, _ in edges}
        kept = [
            (sender, receiver)
            for sender, receiver in edges
            if sender in written and (receiver == "logits" or any(node in read for node in graph.nodes_of(receiver)))
        ]
        if len(kept) == len(edges):
            return kept
        edges = kept

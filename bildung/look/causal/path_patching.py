"""Path patching: does one part act on another, directly? Exact, and in its linear form under that name.

    run the clean prompt; along the path alone, sender -> receiver -> ... -> logits, the change travels that the
    sender's corrupted output makes; every other part reads what it read before.

Goldowsky-Dill et al. 2023 (arXiv 2304.05969): the path's nodes are recomputed hop by hop, all others are as in the
clean run. Wang et al. 2022 (arXiv 2211.00593): sender -> receivers, `through_mlps` of the layers between (heads are
frozen, MLPs are recomputed), and after the receivers everything runs on freely.

The linear form (`norms="frozen"` of an EdgeExperiment; TransformerLens's `direct_path_patching`) carries the change
through the receiver's norm with the clean run's scale: a product of matrices, additive over senders, and not what the
model would do.
"""

# U senders, R receivers, B rows, L tokens, D hidden_size, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.look.graph.edge_experiment import EdgeExperiment, Side
from bildung.look.graph.graph import is_mlp


@torch.no_grad()
def along_path(experiment: EdgeExperiment, path: Sequence[str]) -> float:
    """The metric when a change travels one path and no other, such as ["a0.h0", "a1.h0.k", "logits"].

    The first is a sender, all others receivers. Raises SettingsError for a path that is none.
    """
    graph = experiment.graph
    if len(path) < 2 or path[-1] != "logits":
        raise SettingsError(f"{' -> '.join(path)} is no path; give a sender, receivers, and logits at the end.")
    hops, senders = [], [path[0]]
    for receiver in path[1:]:
        hops.append(experiment.cutting((sender, receiver) for sender in senders))
        senders = graph.nodes_of(receiver)
    total = 0.0
    for side in experiment.sides:
        carried_UBLD, logits_BV = side.other_UBLD, side.clean_BV
        for cut_UR in hops:
            logits_BV, carried_UBLD = experiment.edges.run(side.batch.clean_BL, cut_UR, carried_UBLD)
        total += experiment.measure(side, logits_BV).sum().item()
    return total / experiment.count


@torch.no_grad()
def into_receivers(
    experiment: EdgeExperiment, sender: str, receivers: Sequence[str], *, through_mlps: bool = False
) -> float:
    """The metric when receivers read the sender as corrupted, and everything after them runs on.

    through_mlps: also by way of the MLPs between (Wang et al.); the receivers must then be of one layer. Raises
    SettingsError for receivers that the sender does not reach.
    """
    cut_UR = experiment.cutting((sender, receiver) for receiver in receivers)
    between = _mlps_between(experiment, sender, receivers) if through_mlps else []
    graph = experiment.graph
    for mlp in between:
        cut_UR[graph.index(sender, mlp)] = 1
        row = graph.senders.index(mlp)
        for r, receiver in enumerate(graph.receivers):
            if graph.allowed_UR[row, r] and receiver not in between and receiver not in receivers:
                cut_UR[row, r] = 1  # they read it as it was
    rows = [graph.senders.index(mlp) for mlp in between]
    total = 0.0
    for side in experiment.sides:
        logits_BV, _ = experiment.edges.run(side.batch.clean_BL, cut_UR, _with_clean(side, rows))
        total += experiment.measure(side, logits_BV).sum().item()
    return total / experiment.count


def _with_clean(side: Side, rows: list[int]) -> Tensor:
    if not rows:
        return side.other_UBLD
    other_UBLD = side.other_UBLD.clone()
    other_UBLD[rows] = side.clean_UBLD[rows]
    return other_UBLD


def _mlps_between(experiment: EdgeExperiment, sender: str, receivers: Sequence[str]) -> list[str]:
    graph = experiment.graph
    reach = {graph.reads[graph.receivers.index(receiver)][1] for receiver in receivers}
    if len(reach) > 1:
        raise SettingsError("through_mlps: the receivers must read the same stream (q, k, v of one layer, or one MLP).")
    start, stop = graph.senders.index(sender) + 1, reach.pop()
    return [
        name
        for name in graph.senders[start:stop]
        if is_mlp(name) and graph.allowed_UR[start - 1, graph.receivers.index(name)] and name not in receivers
    ]

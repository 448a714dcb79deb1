"""Which heads and MLPs act on a receiver directly? Path patching of every sender, a grid of layers and heads.

    bildung look path_patch MODEL OUT --pairs ioi --receivers logits
    bildung look path_patch MODEL OUT --pairs ioi --receivers a9.h1.q a9.h4.q --through-mlps
    bildung look path_patch MODEL OUT --pairs ioi --receivers logits --linear

Nodes: embed, a3.h1 (head 1 of layer 3), m3 (its MLP). Receivers: a3.h1.q, a3.h1.k, a3.h1.v (grouped queries: a3.kv0.k),
m3, logits. OUT gets path_patch.html, path_patch.png, path_patch.json and the pairs. See path_patching.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.asked import asked
from bildung.look.causal.answer_metrics import MetricName, recovered
from bildung.look.causal.pair_tasks import Corruption
from bildung.look.causal.path_patching import into_receivers
from bildung.look.graph.edge_experiment import Ablation, EdgeExperiment
from bildung.look.pages.grid_page import write_grids
from bildung.look.pages.page import command_of
from bildung.look.pairs import chosen_pairs, pair_hashes
from bildung.model.store import load


@settings_class
class Settings:
    """Path patching."""

    pairs: str = "ioi"  # ioi, agreement, or a JSONL file of pairs
    count: int = 16  # how many pairs are made, or read
    corruption: Corruption = "abc"
    seed: int = 0
    receivers: tuple[str, ...] = ("logits",)  # read the sender as corrupted; what comes after them runs on
    through_mlps: bool = False  # also by way of the MLPs between (Wang et al. 2022)
    linear: bool = False  # linear path patching: with the norms' scales of the clean run
    metric: MetricName = "logit_difference"
    ablation: Ablation = "resample"
    batch_size: int = 8


def path_patch(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page, the picture and the numbers. Raises SettingsError, DataError."""

    def work(job: Job) -> None:
        lm = load(source, "float32")
        lm.model.eval()
        pairs = chosen_pairs(lm, settings.pairs, settings.count, settings.seed, settings.corruption, job)
        experiment = EdgeExperiment(
            asked(lm),
            pairs,
            settings.metric,
            settings.ablation,
            norms="frozen" if settings.linear else "exact",
            batch_size=settings.batch_size,
        )
        left = sender_effects(experiment, settings.receivers, settings.through_mlps)
        first = pairs.rows[0]
        example = {
            "clean": lm.tokenizer.decode(list(first.clean)),
            "corrupted": lm.tokenizer.decode(list(first.corrupted)),
            "receivers": ", ".join(settings.receivers) + " through MLPs" * settings.through_mlps,
        }
        numbers = as_json(experiment, left, Path(source).name, example, settings) | {"command": command_of(job)}
        (job.out / "path_patch.json").write_text(json.dumps(numbers, ensure_ascii=False) + "\n", encoding="utf-8")
        write_grids(numbers, job.out / "path_patch.html", job.out / "path_patch.png")
        job.measured |= {"clean": numbers["clean"], "corrupted": numbers["corrupted"]}
        strongest = sorted(left, key=lambda name: -abs(left[name] - 1))[:5]
        job.measured["strongest"] = ", ".join(f"{name} {left[name]:.3f}" for name in strongest)
        job.tokens_seen = sum(len(pair.clean) + len(pair.corrupted) for pair in pairs.rows)

    data = pair_hashes(settings.pairs)
    return perform("look path_patch", source, out, settings, work, data=data, force=force)


def sender_effects(experiment: EdgeExperiment, receivers: tuple[str, ...], through_mlps: bool) -> dict[str, float]:
    """{sender: what is left of the metric (1 = all, 0 = as corrupted)} of every sender that all receivers read."""
    graph = experiment.graph
    if not receivers:
        raise SettingsError("no receiver was given: logits, or such as a1.h0.q, a1.h0.k, a1.h0.v, m1.")
    for receiver in receivers:
        if receiver not in graph.receivers:
            graph.index(graph.senders[0], receiver)  # a name that there is not is an error
    left = {}
    for row, sender in enumerate(graph.senders):
        if all(graph.allowed_UR[row, graph.receivers.index(receiver)] for receiver in receivers):
            value = into_receivers(experiment, sender, receivers, through_mlps=through_mlps)
            left[sender] = float(recovered(value, experiment.clean, experiment.corrupted))
    if set(left) <= graph.embeds:
        raise SettingsError(
            "no head and no MLP writes before all of these receivers read; the first layer's read tokens."
        )
    return left


def as_json(
    experiment: EdgeExperiment, left: dict[str, float], model: str, example: dict[str, str], settings: Settings
) -> dict[str, Any]:
    """Everything the page and the picture show: layers by heads, and the layer's MLP in the last column."""
    graph = experiment.graph
    grids = []
    for half, stack in graph.halves.items():
        layers = [n for n in range(stack.layers) if f"{half}a{n}.h0" in left]
        parts = {str(head): f"a{{}}.h{head}" for head in range(stack.heads)}
        if not half and graph.encoder is not None:
            parts |= {f"source {head}": f"c{{}}.h{head}" for head in range(stack.heads)}
        parts |= {"mlp": "m{}"} if stack.mlps else {}
        grids.append(
            {
                "title": ("encoder " if half else "") + f"into {', '.join(settings.receivers)}",
                "note": "left when the sender is corrupted for it",
                "columns": list(parts),
                "rows": [str(n) for n in layers],
                "values": [[round(left.get(half + name.format(n), 1.0), 4) for name in parts.values()] for n in layers],
                "neutral": 1.0,
            }
        )
    what = "linear path patching (frozen norms)" if settings.linear else "path patching"
    return {
        "title": what,
        "model": model,
        "metric": settings.metric,
        "clean": round(experiment.clean, 4),
        "corrupted": round(experiment.corrupted, 4),
        "embed": {name: round(left[name], 4) for name in sorted(graph.embeds & left.keys())},
        "example": example,
        "low": "as the corrupted prompt",
        "high": "as the clean prompt",
        "grids": [grid for grid in grids if grid["rows"]],
    }

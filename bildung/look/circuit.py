"""Find the circuit behind an answer, or measure a given one: faithfulness, completeness, size, and a drawing.

    bildung look circuit MODEL OUT --pairs ioi --method eap_ig --edges 200
    bildung look circuit MODEL OUT --pairs ioi --faithful 0.8               as many edges as that takes
    bildung look circuit TINY OUT --pairs my_pairs.jsonl --method acdc --threshold 0.02
    bildung look circuit TUNED OUT --pairs ioi --circuit base_circuit/circuit.json      what is left of it after a tune

Methods: eap, eap_ig (edge_attribution.py), acdc (acdc.py; with `candidates`, only over the edges EAP-IG ranks first).
Metrics: logit_difference, probability, kl (answer_metrics.py). OUT gets circuit.json, circuit.html (one file, works
offline), circuit.png, circuit.svg and pairs.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record, hash_directory, hash_file
from bildung.core.settings import settings as settings_class
from bildung.look.asked import asked
from bildung.look.causal.answer_metrics import MetricName
from bildung.look.causal.pair_tasks import Corruption
from bildung.look.graph.acdc import acdc
from bildung.look.graph.circuit_file import Circuit, architecture_of, load_circuit, save_circuit
from bildung.look.graph.edge_attribution import connected, edge_scores, strongest
from bildung.look.graph.edge_experiment import Ablation, Edge, EdgeExperiment
from bildung.look.graph.faithfulness import grown, measure_circuit
from bildung.look.pages.circuit_page import write_circuit
from bildung.look.pages.page import command_of
from bildung.look.pairs import chosen_pairs, pair_hashes
from bildung.model.store import load

Method = Literal["eap", "eap_ig", "acdc"]


@settings_class
class Settings:
    """A circuit."""

    pairs: str = "ioi"  # ioi, agreement, or a JSONL file of pairs
    count: int = 32  # how many pairs are made, or read
    corruption: Corruption = "abc"  # of ioi: three other names, or the second one swapped
    seed: int = 0  # of what is made and of the knockouts
    circuit: Path | None = None  # a circuit file to measure; none is searched for
    method: Method = "eap_ig"
    metric: MetricName = "logit_difference"  # of the search; faithfulness is measured by it too
    ablation: Ablation = "resample"  # what stands in for a cut edge
    edges: int = 200  # eap, eap_ig: how many of the highest scores
    faithful: float | None = None  # eap, eap_ig: from `edges` on twice as many, until the circuit recovers this share
    steps: int = 5  # eap_ig: gradients along the way from the corrupted to the clean prompt
    threshold: float = 0.02  # acdc: what an edge must be worth
    candidates: int | None = None  # acdc: search only among so many of eap_ig's first edges
    knockouts: int = 8  # random halves of the circuit that are cut, for completeness
    minimal: bool = False  # also cut each edge alone
    batch_size: int = 8


def circuit(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Search, measure, save and draw. Raises SettingsError, DataError."""

    def work(job: Job) -> None:
        lm = load(source, "float32")
        lm.model.eval()
        pairs = chosen_pairs(lm, settings.pairs, settings.count, settings.seed, settings.corruption, job)
        experiment = EdgeExperiment(
            asked(lm), pairs, settings.metric, settings.ablation, batch_size=settings.batch_size
        )
        architecture = architecture_of(lm.config)
        if settings.circuit is not None:
            given = load_circuit(settings.circuit, experiment.graph, lm.config)
            edges, found = given.edges, given.found
        else:
            edges, tried = search(experiment, settings)
            found = _how(settings) | ({"tried": tried} if tried else {})
        model_hash = hash_directory(Path(source))
        if settings.circuit is not None and given.model_hash != model_hash:
            job.notes.append("the circuit was found on other weights of this architecture")
        measured = measure_circuit(
            experiment, edges, knockouts=settings.knockouts, seed=settings.seed, minimal=settings.minimal
        )
        made = Circuit(edges, architecture, model_hash, found, measured)
        save_circuit(made, job.out / "circuit.json")
        write_circuit(made, experiment.graph, Path(source).name, job.out, command_of(job))
        job.measured |= measured
        job.tokens_seen = sum(len(pair.clean) + len(pair.corrupted) for pair in pairs.rows)

    data = pair_hashes(settings.pairs)
    if settings.circuit is not None:
        if not settings.circuit.is_file():
            raise DataError(f"{settings.circuit}: there is no circuit file; give OUT/circuit.json of a search.")
        data |= {"circuit": hash_file(settings.circuit)}
    return perform("look circuit", source, out, settings, work, data=data, force=force)


def _how(settings: Settings) -> dict[str, Any]:
    asked: dict[str, Any] = {"steps": settings.steps} if settings.method == "eap_ig" else {}
    if settings.method == "acdc":
        asked = {"threshold": settings.threshold} | ({"candidates": settings.candidates} if settings.candidates else {})
    pairs = {"from": settings.pairs, "count": settings.count, "seed": settings.seed, "corruption": settings.corruption}
    return {
        "method": settings.method,
        **asked,
        "metric": settings.metric,
        "ablation": settings.ablation,
        "pairs": pairs,
    }


def search(experiment: EdgeExperiment, settings: Settings) -> tuple[dict[Edge, float | None], list[list[float]]]:
    """(the edges by the chosen method, with their scores; sizes that were tried and how faithful they were).

    Raises SettingsError if nothing is left, or for a share that is no share.
    """
    graph, tried = experiment.graph, list[list[float]]()
    if settings.faithful is not None and (settings.method == "acdc" or not 0 < settings.faithful <= 1):
        raise SettingsError(f"faithful = {settings.faithful}; it is a share in (0, 1], of the methods eap and eap_ig.")
    scores_UR = None
    if settings.method != "acdc" or settings.candidates is not None:
        scores_UR = edge_scores(experiment, 1 if settings.method == "eap" else settings.steps)
    if settings.method == "acdc":
        first = None if scores_UR is None else strongest(graph, scores_UR, settings.candidates or 0)
        edges = acdc(experiment, settings.threshold, first)
    else:
        assert scores_UR is not None
        edges = strongest(graph, scores_UR, settings.edges)
        if settings.faithful is not None:
            edges, tried = grown(experiment, scores_UR, settings.edges, settings.faithful)
    if not connected(graph, edges):
        raise SettingsError("no way from the embedding to the logits is left; ask for more edges or a lower threshold.")
    if scores_UR is None:
        return dict.fromkeys(edges), tried
    scored: dict[Edge, float | None] = {edge: float(f"{scores_UR[graph.index(*edge)].item():.5g}") for edge in edges}
    return scored, tried

"""The passes of looks that change activations: patches on pairs of prompts, edges of the graph, two models.

    patch                 the activations of one site in every layer, and a run with one of them changed
    path_patch, circuit   what every node of the graph wrote, of every batch and both prompts: nodes x B x L x D each
    compare               two models; on a text every part of the comparison, one after the other

The patched runs are many, and alike; one of them is run on paper.
"""

# B rows, L tokens, D hidden_size, U nodes that write

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from bildung.app.planning.passes import PICTURE, Look, Pass, told
from bildung.app.planning.using import file_bytes
from bildung.core.operation import Job
from bildung.look.asked import asked
from bildung.look.attention_heads.head_change import head_change
from bildung.look.causal.answer_metrics import answer_metric
from bildung.look.causal.cross_patching import stretches
from bildung.look.causal.patching import cells, frozen, last_logits, layer_sites, putting, reads_prompt
from bildung.look.causal.path_patching import into_receivers
from bildung.look.causal.prompt_pairs import Pairs
from bildung.look.compare import PIECE
from bildung.look.comparing.similarity import FEWEST, similarity
from bildung.look.comparing.weight_change import DIRECTIONS, decompose, leading
from bildung.look.graph.edge_attribution import edge_scores
from bildung.look.graph.edge_experiment import EdgeExperiment
from bildung.look.graph.graph import graph_of
from bildung.look.lenses.lens import lens_difference
from bildung.look.lenses.token_difference import token_difference
from bildung.look.pairs import chosen_pairs
from bildung.model.base import CausalLM
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene, observe, sites
from bildung.model.twin import base_of


def pairs_of(look: Look, lm: LanguageModel) -> Pairs:
    """The pairs of prompts that the look will use. Raises DataError, as it will."""
    with tempfile.TemporaryDirectory() as place:
        given, job = look.given, Job("", None, Path(place), None)
        return chosen_pairs(lm, given.pairs, given.count, given.seed, given.corruption, job)


def patch_passes(look: Look) -> list[Pass]:
    """`look patch`."""
    given = look.given
    lm = look.read(look.source, "float32")
    pairs, model = pairs_of(look, lm), asked(lm)
    batches = pairs.batches(given.batch_size)
    batch = max(batches, key=lambda one: one.clean_BL.numel())
    rows, length = batch.clean_BL.shape
    found = []
    for site, by_head in [*((one, False) for one in given.sites), *((one, True) for one in given.heads)]:
        names = layer_sites(model, site)
        columns = _columns(look, model, names[0], pairs, by_head)

        def run(lms: list[LanguageModel], names: list[str] = names, by_head: bool = by_head) -> Any:
            model = asked(lms[0])
            shape, tokens_BL = sites(model)[names[0]], batch.clean_BL.to(model.device)
            with torch.no_grad():
                clean_BV, corrupted_BV = last_logits(model, tokens_BL), last_logits(model, tokens_BL)
                with observe(model, names) as seen:
                    last_logits(model, tokens_BL)
            kept = dict(seen)
            if given.attribution:
                with frozen(model), intervene(model, {names[0]: lambda x: x.detach().requires_grad_()}):
                    with observe(model, names) as here:
                        total = answer_metric(given.metric, last_logits(model, tokens_BL), batch.rows, clean_BV).sum()
                    gradients = torch.autograd.grad(total, [here[name] for name in names], allow_unused=True)
                changed = [x - kept[name] for name, x in here.items()]
                return kept, gradients, changed
            where = cells(shape, kept[names[-1]], None, 0 if by_head else None)
            with torch.no_grad(), intervene(model, {names[-1]: putting(kept[names[-1]], where)}):
                patched_BV = last_logits(model, tokens_BL)
                return kept, corrupted_BV, answer_metric(given.metric, patched_BV, batch.rows, clean_BV)

        runs = 4 if given.attribution else 3 + len(names) * columns
        what = f"{site} patched in {rows} prompts of {length} tokens"
        found.append(Pass(what, run, runs * len(batches), back=given.attribution))
    look.later["the picture"] = PICTURE
    return found


def _columns(look: Look, model: Any, name: str, pairs: Pairs, by_head: bool) -> int:
    """How many patches a layer gets."""
    if by_head:
        config = model.config
        return int(config.num_attention_heads if "N" in sites(model)[name].split() else config.num_key_value_heads)
    places = pairs.places() if reads_prompt(model, name) else model.answer
    return len(look.given.at) or len(places)


def graph_passes(look: Look) -> list[Pass]:
    """`look path_patch` and `look circuit`. What every node wrote is kept of all batches; one of them is run."""
    given = look.given
    lm = look.read(look.source, "float32")
    pairs = pairs_of(look, lm)
    batches = pairs.batches(given.batch_size)
    largest = max(batches, key=lambda one: one.clean_BL.numel())
    norms: Any = "frozen" if getattr(given, "linear", False) else "exact"

    def experiment(lms: list[LanguageModel]) -> EdgeExperiment:
        some = Pairs(largest.rows)
        return EdgeExperiment(asked(lms[0]), some, given.metric, given.ablation, norms=norms, batch_size=len(some.rows))

    rows, length = largest.clean_BL.shape
    others = sum(one.clean_BL.numel() for one in batches) - largest.clean_BL.numel()
    nodes = len(graph_of(asked(lm)).senders)
    written = 2 * nodes * lm.config.hidden_size * 4  # of a token: on the clean and on the corrupted prompt
    look.parts["what the graph's nodes wrote, other batches"] = others * written
    what = f"{rows} prompts of {length} tokens through a graph of {nodes} nodes that write"

    def sender_run(lms: list[LanguageModel]) -> Any:
        made = experiment(lms)
        return made, into_receivers(made, made.graph.senders[0], ("logits",))

    def scores_run(lms: list[LanguageModel]) -> Any:
        made = experiment(lms)
        return made, edge_scores(made, 1 if given.method == "eap" else 2)

    def value_run(lms: list[LanguageModel]) -> Any:
        made = experiment(lms)
        return made, made.value(made.no_cut())

    look.later["the picture"] = PICTURE
    known = 4 * len(batches)  # what is written on both prompts, and the metric with nothing and with all cut
    if not hasattr(given, "method"):
        return [Pass(f"{what}, a sender's edges cut", sender_run, known + nodes * len(batches), runs=5)]
    if given.circuit is not None or (given.method == "acdc" and given.candidates is None):
        return [Pass(f"{what}, edges cut", value_run, None, runs=5)]
    steps = 1 if given.method == "eap" else given.steps
    measured = 2 + 2 * given.knockouts + (given.edges if given.minimal else 0)
    tries = given.faithful is not None or given.method == "acdc"  # only the search says how many
    times = None if tries else known + (3 * steps + measured) * len(batches)  # back is as much as two passes
    return [Pass(f"{what}, and back, for the gradient of every edge", scores_run, times, runs=7, back=True)]


def compare_passes(look: Look) -> list[Pass]:
    """`look compare`."""
    given = look.given
    paths = [look.source, look.source if "against" in look.assumed else given.against]
    lms = [look.read(path, given.dtype) for path in paths]
    for lm in lms:
        lm.model.eval()
    if "against" in look.assumed:
        look.say("against: a second model of this shape, with other weights")
    elif base_of(paths[0]) == base_of(paths[1]):  # two on one base hold it once
        look.parts["weights"] -= file_bytes(base_of(paths[0]))
    found = [Pass("the largest matrix's change, taken apart in float64", _matrix)]
    if "prompt" in look.assumed or given.prompt is None:
        look.say("prompt: none, so that the weights alone are compared")
        return found
    ids = look.ids(lms[0], given.chat, given.max_tokens)
    pieces = [[0] * PIECE] * max(1, given.data_tokens // PIECE) if given.data is not None else []

    @torch.no_grad()
    def read(lms: list[LanguageModel]) -> Any:
        (a, tokens), (b, _) = (told(lm, ids) for lm in lms)
        parts = [head_change(a, b, tokens)]
        if isinstance(a.model, CausalLM):
            token_difference(a, b, tokens)
        lens_difference(a, b, tokens, max_tokens=len(tokens))
        if sum(len(row) - 1 for row in (ids, *pieces)) >= FEWEST:
            similarity(lms[0], lms[1], [ids, *pieces])
        return parts

    @torch.no_grad()
    def patched(lms: list[LanguageModel], site: str, rows: int) -> Any:
        (a, tokens), (b, _) = (told(lm, ids) for lm in lms)
        names = layer_sites(a.model, site)
        tokens_RL = torch.tensor([tokens] * rows, device=a.model.device)
        with observe(b.model, names) as seen:
            b.model.hidden(tokens_RL)
        kept = {name: x[:1].clone() for name, x in seen.items()}
        del seen
        where = cells(sites(a.model)[names[-1]], kept[names[-1]], None)
        listening = {**dict.fromkeys(names, lambda x: None), names[-1]: putting(kept[names[-1]], where)}
        with intervene(a.model, listening):
            h_RLD = a.model.hidden(tokens_RL)
        return kept, a.model.unembed(h_RLD[:1, -1:] if given.over == "last" else h_RLD[:1]).float().log_softmax(-1)

    found.append(Pass(f"both models on a text of {len(ids)} tokens: predictions, lenses, heads, layers", read))
    if not isinstance(told(lms[0], ids)[0].model, CausalLM):
        return found
    for site in (*given.sites, *given.heads):
        names = layer_sites(told(lms[0], ids)[0].model, site)
        heads = site in given.heads
        columns = lms[0].config.num_attention_heads if heads else len(stretches(len(ids), given.columns))
        rows = min(given.batch_size, columns)
        times = 2 + len(names) * math.ceil(columns / rows)
        what = f"{site} of the second in {rows} rows of the first"
        found.append(Pass(what, lambda lms, site=site, rows=rows: patched(lms, site, rows), times))  # type: ignore[misc]
    return found


def _matrix(lms: list[LanguageModel]) -> Any:
    """The change of the largest matrix, as weight_change works it out where both models have all of it."""
    pairs = zip(*(lm.model.linears().values() for lm in lms), strict=False)
    a, b = max(pairs, key=lambda pair: pair[0].in_features * pair[0].out_features)
    with torch.no_grad():
        found = decompose(b.effective(torch.float64)[0] - a.effective(torch.float64)[0])
        return found, leading(a.effective(torch.float32)[0], DIRECTIONS)

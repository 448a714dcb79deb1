"""Against TransformerLens 2.16.1 on the same weights, in float64: activations, patching, attribution patching.

The file beside this one holds its answers; `python -m benchmarks.lens_golden` wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bildung.look.causal.patching import patching_grid
from bildung.look.graph.edge_attribution import edge_scores
from bildung.look.graph.edge_experiment import EdgeExperiment
from bildung.model.taps import observe
from tests.golden.transformer_lens import model_by_rule, pairs_by_rule

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("transformer_lens.json").read_text())
CLOSE = {"atol": 1e-6, "rtol": 1e-5}
HEADS = {"attn.q", "attn.k", "attn.v", "attn.probs", "attn.z"}


def test_activations_are_those_of_its_cache():
    model, pairs = model_by_rule(), pairs_by_rule()
    with torch.no_grad(), observe(model, [f"layers.*.{word}" for word in GOLDEN["activations"]]) as seen:
        model(torch.tensor([row.clean for row in pairs.rows]))
    for word, layers in GOLDEN["activations"].items():
        for layer, theirs in enumerate(layers):
            ours = seen[f"layers.{layer}.{word}"][0].flatten()[: len(theirs)]
            torch.testing.assert_close(ours, torch.tensor(theirs).double(), **CLOSE)


@pytest.mark.parametrize("how", ["attribution", "patching"])
def test_patches_and_attributions_are_those_of_its_hooks(how: str):
    """Attribution: (clean - corrupted) * gradient on the corrupted run; patching: its own `patching` module."""
    model, pairs = model_by_rule(), pairs_by_rule()
    for word, theirs in GOLDEN[how].items():
        across: Any = "head" if word in HEADS else "place"
        grid = patching_grid(model, pairs, site=word, across=across, attribution=how == "attribution")
        assert grid.clean == pytest.approx(GOLDEN["clean"]) and grid.corrupted == pytest.approx(GOLDEN["corrupted"])
        ours = grid.values - grid.corrupted if how == "attribution" else grid.values
        torch.testing.assert_close(ours.double(), torch.tensor(theirs).double(), **CLOSE)


def test_edges_of_a_part_add_up_to_its_attribution():
    """EAP splits attribution patching (of the clean run, towards the corrupted one) over the readers of a head."""
    model, pairs = model_by_rule(), pairs_by_rule()
    experiment = EdgeExperiment(model, pairs)
    scores_UR, graph = edge_scores(experiment).double(), experiment.graph
    grid = patching_grid(model, pairs, site="attn.z", across="head", direction="noising", attribution=True)
    for layer in range(graph.layers):
        whole_N = scores_UR[graph.rows(layer)].sum(1)
        torch.testing.assert_close(whole_N, (grid.values - grid.clean)[layer].double(), **CLOSE)

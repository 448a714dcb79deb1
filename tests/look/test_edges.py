"""Edges: a circuit set by hand is found exactly by every method, and cut edges add up to what patching does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bildung
from bildung.core.errors import SettingsError
from bildung.look.asked import Asked
from bildung.look.causal.answer_metrics import answer_metric
from bildung.look.causal.patching import last_logits, patching_grid
from bildung.look.causal.path_patching import along_path, into_receivers
from bildung.look.causal.prompt_pairs import Pair, Pairs
from bildung.look.graph.acdc import acdc
from bildung.look.graph.edge_attribution import connected, edge_scores, strongest
from bildung.look.graph.edge_experiment import EdgeExperiment
from bildung.look.graph.graph import Graph, graph_of
from tests.contract.test_families import made
from tests.look.induction_by_hand import CIRCUIT, induction_model, induction_pairs
from tests.model.tiny import tiny_decoder, tokens

KINDS: dict[str, dict[str, Any]] = {
    "llama, grouped": {},
    "qwen3, heads normalised": {"model_type": "qwen3"},
    "gpt_neox, parallel, biases": {"model_type": "gpt_neox", "num_key_value_heads": None, "rms_norm_eps": None},
    "attention alone": {"model_type": "bildung", "mlp": False, "intermediate_size": None, "rms_norm_eps": None},
}


def random_pairs(rows: int = 3, length: int = 6) -> Pairs:
    """Any tokens; the answer is token 5, the wrong one 9."""
    sides = zip(tokens(rows, length, 1).tolist(), tokens(rows, length, 2).tolist(), strict=True)
    return Pairs(tuple(Pair(tuple(clean), tuple(corrupted), (5,), (9,)) for clean, corrupted in sides))


def kind(name: str) -> Any:
    """A small model whose biases, where it has any, are not zero."""
    small = {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "head_dim": 6,
        "intermediate_size": 20,
        "initializer_range": 0.3,
    }
    changes = {**small, **KINDS[name]}
    if changes.get("model_type") == "gpt_neox":
        changes |= {"head_dim": None, "use_parallel_residual": True, "rotary_pct": 1.0}
    model = tiny_decoder(**changes)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_every_method_finds_the_circuit_set_by_hand():
    model, pairs = induction_model(), induction_pairs()
    experiment = EdgeExperiment(model, pairs)
    assert experiment.clean > 5 and experiment.corrupted < -5
    for steps in (1, 4):
        scores_UR = edge_scores(experiment, steps)
        assert set(strongest(experiment.graph, scores_UR, 1000, least=1e-4)) == CIRCUIT
        assert (scores_UR[scores_UR.abs() > 1e-4] < 0).all()  # cutting any of them costs
    assert set(acdc(experiment, 0.05)) == CIRCUIT
    assert set(acdc(EdgeExperiment(model, pairs, "kl"), 0.01)) == CIRCUIT
    graph = experiment.graph
    moved = {
        (sender, receiver)
        for sender in graph.senders
        for receiver in graph.receivers
        if graph.allowed_UR[graph.senders.index(sender), graph.receivers.index(receiver)]
        and abs(into_receivers(experiment, sender, [receiver]) - experiment.clean) > 1e-4
    }
    assert moved == CIRCUIT
    ways = [["a0.h0", f"a1.h{head}.{word}", "logits"] for head in range(3) for word in "qkv"]
    assert [way[1] for way in ways if abs(along_path(experiment, way) - experiment.clean) > 1e-4] == ["a1.h0.k"]


@pytest.mark.parametrize("name", KINDS)
def test_cutting_all_edges_of_a_part_is_patching_it(name: str):
    """All paths from a head together are the head's activation patch; all edges of all parts are the corrupted run."""
    model, pairs = kind(name), random_pairs()
    experiment = EdgeExperiment(model, pairs)
    graph, (batch,) = experiment.graph, pairs.batches(8)
    with torch.no_grad():
        plain = last_logits(model, batch.clean_BL)
    side = experiment.sides[0]
    assert torch.equal(experiment.edges.run(batch.clean_BL, experiment.no_cut(), side.other_UBLD)[0], plain)
    corrupted = answer_metric("logit_difference", last_logits(model, batch.corrupted_BL), batch.rows, plain).mean()
    assert experiment.corrupted == pytest.approx(corrupted.item(), abs=1e-4)
    by_head = patching_grid(model, pairs, site="attn.z", across="head", direction="noising")
    for layer in range(graph.layers):
        for head in range(graph.heads):
            row = graph.senders.index(f"a{layer}.h{head}")
            cut_UR = experiment.no_cut()
            cut_UR[row] = graph.allowed_UR[row].float()
            assert experiment.value(cut_UR) == pytest.approx(by_head.values[layer, head].item(), abs=1e-4)
    if graph.mlps:
        row = graph.senders.index("m0")
        cut_UR = experiment.no_cut()
        cut_UR[row] = graph.allowed_UR[row].float()
        site = patching_grid(model, pairs, site="mlp.out", across="place", at=["0"], direction="noising")
        every = experiment.value(cut_UR)
        assert every != pytest.approx(site.values[0, 0].item(), abs=1e-4)  # one position is not all


@pytest.mark.parametrize("name", ["llama, grouped", "gpt_neox, parallel, biases"])
def test_scores_are_the_metrics_slope(name: str):
    """EAP is the derivative of the metric by how much of an edge is cut, and one step of EAP-IG."""
    model, pairs = kind(name), random_pairs()
    model = model.double()
    experiment = EdgeExperiment(model, pairs)
    scores_UR = edge_scores(experiment)
    for edge in [("embed", "a0." + ("h1" if "neox" in name else "kv1") + ".v"), ("a0.h2", "a1.h3.q"), ("m0", "m1")]:
        u, r = experiment.graph.index(*edge)
        values = []
        for much in (-1e-4, 1e-4):
            cut_UR = experiment.no_cut().double()
            cut_UR[u, r] = much
            side = experiment.sides[0]
            logits_BV, _ = experiment.edges.run(side.batch.clean_BL, cut_UR, side.other_UBLD)
            values.append(experiment.measure(side, logits_BV.double()).mean().item())
        assert (values[1] - values[0]) / 2e-4 == pytest.approx(scores_UR[u, r].item(), rel=2e-2, abs=2e-3)
    with pytest.raises(SettingsError, match="KL is zero"):
        edge_scores(EdgeExperiment(model, pairs, "kl"))


def test_attribution_is_patching_in_a_linear_model():
    """Identity norms, constant attention, no MLP: the first order is all there is. With real norms it is not."""
    pairs = random_pairs()
    for linear in (True, False):
        model = kind("attention alone")
        for layer in model.model.layers if linear else ():
            layer.input_layernorm = nn.Identity()
            layer.self_attn.q_proj.base.weight.data.zero_()
        if linear:
            model.model.norm = nn.Identity()
        for site, across in (("resid_pre", "place"), ("attn.z", "head"), ("attn.out", "place")):
            for direction in ("denoising", "noising"):
                exact, first = (
                    patching_grid(model, pairs, site=site, across=across, direction=direction, attribution=attribution)
                    for attribution in (False, True)
                )
                assert torch.allclose(exact.values, first.values, atol=1e-4) == linear
        edges = EdgeExperiment(model, pairs)
        exact_cut = edges.value(edges.cutting([("embed", "a1.kv1.v")])) - edges.clean
        score = edge_scores(edges)[edges.graph.index("embed", "a1.kv1.v")].item()
        assert (exact_cut == pytest.approx(score, abs=1e-4)) == linear


def test_attribution_knows_what_heads_write_and_scores_that_are_masked():
    model, pairs = kind("llama, grouped"), random_pairs()
    z, result, scores = (
        patching_grid(model, pairs, site=site, across="head", attribution=True).values
        for site in ("attn.z", "attn.result", "attn.scores")
    )
    assert torch.allclose(z, result, atol=1e-5)  # what a head writes is a matrix times its z
    assert z[1].std() > 0.01 and scores.isfinite().all()  # -inf in both runs: no change


def test_path_patching_hop_by_hop_and_through_mlps():
    model, pairs = kind("llama, grouped"), random_pairs()
    experiment = EdgeExperiment(model, pairs)
    cut = experiment.value(experiment.cutting([("a0.h1", "logits")]))
    assert along_path(experiment, ["a0.h1", "logits"]) == pytest.approx(cut, abs=1e-5)
    # Wang et al.'s procedure in their words: freeze all heads as clean but the sender, read the receiver's query...
    (batch,) = pairs.batches(8)
    sites = [f"layers.{n}.attn.z" for n in (0, 1)]
    with torch.no_grad():
        with bildung.observe(model, sites) as clean:
            plain = last_logits(model, batch.clean_BL)
        with bildung.observe(model, sites) as corrupted:
            last_logits(model, batch.corrupted_BL)
        sender = clean[sites[0]].clone()
        sender[:, :, 1] = corrupted[sites[0]][:, :, 1]
        frozen = {sites[0]: lambda z: sender, sites[1]: lambda z: clean[sites[1]]}
        with bildung.intervene(model, frozen), bildung.observe(model, "layers.1.attn.q") as seen:
            last_logits(model, batch.clean_BL)

        def receive(q_BLNH: torch.Tensor) -> torch.Tensor:  # ... and run the clean prompt with it
            q_BLNH = q_BLNH.clone()
            q_BLNH[:, :, 2] = seen["layers.1.attn.q"][:, :, 2]
            return q_BLNH

        with bildung.intervene(model, {"layers.1.attn.q": receive}):
            wanted = answer_metric("logit_difference", last_logits(model, batch.clean_BL), batch.rows, plain)
    got = into_receivers(experiment, "a0.h1", ["a1.h2.q"], through_mlps=True)
    assert got == pytest.approx(wanted.mean().item(), abs=1e-5)
    assert got != pytest.approx(into_receivers(experiment, "a0.h1", ["a1.h2.q"]), abs=1e-5)
    with pytest.raises(SettingsError, match=r"after a0\.h1\.q has read"):
        into_receivers(experiment, "a1.h0", ["a0.h1.q"])


@pytest.mark.parametrize("name", ["llama, grouped", "gpt_neox, parallel, biases"])
def test_linear_path_patching_adds_up_and_exact_does_not(name: str):
    model, pairs = kind(name), random_pairs()
    for norms, adds in (("frozen", True), ("exact", False)):
        experiment = EdgeExperiment(model, pairs, norms=norms)
        alone = [along_path(experiment, [sender, "logits"]) - experiment.clean for sender in experiment.graph.senders]
        everyone = experiment.cutting((sender, "logits") for sender in experiment.graph.senders)
        together = experiment.value(everyone) - experiment.clean
        assert (sum(alone) == pytest.approx(together, abs=1e-4)) == adds


def test_the_graph_of_an_encoder_decoder_goes_through_the_source():
    """Nothing cut is the clean run, all cut the corrupted one; cutting all edges of a part patches what it writes."""
    lm, random = made("t5"), torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 250, (2, length), generator=random).tolist() for length in (5, 5, 3)]
    pairs = Pairs(tuple(Pair(tuple(a), tuple(b), (7,), (9,)) for a, b in rows))
    for answer in ((258,), (258, 11, 12, 13)):
        model = Asked(lm.model, answer)
        experiment = EdgeExperiment(model, pairs)
        graph = experiment.graph
        assert _is_edge(graph, "e.a1.h5", "c0.h2.k") and _is_edge(graph, "c0.h2", "m0")
        assert not _is_edge(graph, "e.m1", "logits") and not _is_edge(graph, "embed", "e.m0")
        for which, found in (("clean_BL", experiment.clean), ("corrupted_BL", experiment.corrupted)):
            with torch.no_grad():
                logits = torch.cat([last_logits(model, getattr(batch, which)) for batch in pairs.batches(8)])
            assert found == pytest.approx((logits[:, 7] - logits[:, 9]).mean().item(), abs=1e-4)
        for site, part in (("attn.z", "e.a{}.h{}"), ("decoder.attn.z", "a{}.h{}"), ("decoder.cross.z", "c{}.h{}")):
            grid = patching_grid(model, pairs, site=site, across="head", direction="noising")
            for layer, head in ((0, 2), (1, 5)):
                name = part.format(layer, head)
                row = graph.senders.index(name)
                edges = [(name, r) for n, r in enumerate(graph.receivers) if graph.allowed_UR[row, n]]
                assert experiment.value(experiment.cutting(edges)) == pytest.approx(
                    grid.values[layer, head].item(), abs=1e-4
                )
    for edge in (("e.a0.h2", "c1.h3.k"), ("e.embed", "c0.h1.v"), ("c0.h4", "m0"), ("a0.h1", "c1.h0.q")):
        score = edge_scores(experiment)[graph.index(*edge)].item()
        little = experiment.cutting([edge]) * 1e-2
        assert (experiment.value(little) - experiment.clean) / 1e-2 == pytest.approx(score, rel=0.1, abs=2e-3)


def _is_edge(graph: Graph, sender: str, receiver: str) -> bool:
    return bool(graph.allowed_UR[graph.senders.index(sender), graph.receivers.index(receiver)])


def test_graph_names_what_it_refuses():
    graph = graph_of(kind("llama, grouped"))
    assert graph.nodes_of("a1.kv1.k") == ["a1.h2", "a1.h3"] and graph.inputs_of("a0.h3") == [
        "a0.h3.q",
        "a0.kv1.k",
        "a0.kv1.v",
    ]
    dangling = [("embed", "m0"), ("m0", "logits"), ("embed", "a1.h0.q"), ("a0.h1", "logits")]
    assert connected(graph, dangling) == dangling[:2]
    with pytest.raises(SettingsError, match=r"no node 'a0\.h9'.*'a0\.h"):
        graph.index("a0.h9", "logits")
    post = tiny_decoder(model_type="bildung", norm_placement="post", rms_norm_eps=None)
    with pytest.raises(SettingsError, match="norms stand post"):
        graph_of(post)

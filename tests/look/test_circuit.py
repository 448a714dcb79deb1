"""Circuits as files: measured, drawn, refused elsewhere; grids of patches and traces as pages; pairs of prompts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import bildung
from bildung.core.errors import DataError, SettingsError
from bildung.look import circuit as circuit_verb
from bildung.look import pairs as pairs_verb
from bildung.look import patch as patch_verb
from bildung.look import path_patch as path_verb
from bildung.look import trace as trace_verb
from bildung.look.causal.causal_trace import causal_trace, span_of
from bildung.look.causal.pair_tasks import make_rows
from bildung.look.causal.patching import patching_grid
from bildung.look.causal.prompt_pairs import encode_pairs
from bildung.look.graph.circuit_file import Circuit, architecture_of, load_circuit, save_circuit
from bildung.look.graph.edge_attribution import edge_scores, strongest
from bildung.look.graph.edge_experiment import EdgeExperiment
from bildung.look.graph.faithfulness import grown, measure_circuit
from bildung.look.graph.graph import Graph
from bildung.look.pages import circuit_page
from bildung.look.pages.circuit_page import layout
from bildung.model.store import LanguageModel
from tests.look.induction_by_hand import CIRCUIT, induction_model, induction_pairs
from tests.look.test_edges import random_pairs
from tests.model.tiny import tiny_lm, tokens

SMALL = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 20}
ROWS = [
    {"clean": "ab cab", "corrupted": "xy cxb", "answers": ["c"], "wrong": ["d"]},
    {"clean": "fg xfg", "corrupted": "ab qab", "answers": ["x"], "wrong": ["q"]},
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A small model, and pairs for it."""
    bildung.save(tiny_lm(**SMALL, initializer_range=0.3), tmp_path / "lm")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_the_known_circuit_is_faithful_complete_and_small():
    experiment = EdgeExperiment(induction_model(), induction_pairs())
    whole = measure_circuit(experiment, CIRCUIT, minimal=True)
    assert whole["faithfulness"] == pytest.approx(1) and whole["without"] < 0.05
    assert whole["incompleteness"] == pytest.approx(0, abs=1e-4) and whole["minimality"] == 1
    assert (whole["edges"], whole["nodes"]) == (5, 2) and whole["edges_of"] == int(experiment.graph.allowed_UR.sum())
    half = measure_circuit(experiment, CIRCUIT - {("a0.h0", "a1.h0.k")})
    assert half["faithfulness"] < 0.9
    idle = measure_circuit(experiment, CIRCUIT | {("a0.h1", "a1.h2.q")}, minimal=True)
    assert idle["minimality"] == pytest.approx(5 / 6, abs=1e-4) and idle["faithfulness"] == pytest.approx(1)


def test_a_circuit_grows_until_it_is_faithful():
    experiment = EdgeExperiment(induction_model(), induction_pairs())
    scores_UR = edge_scores(experiment)
    edges, tried = grown(experiment, scores_UR, 1, 0.95)
    assert tried[-1][1] >= 0.95 > max(share for _, share in tried[:-1]) and set(edges) <= CIRCUIT
    assert measure_circuit(experiment, edges, knockouts=0)["faithfulness"] == pytest.approx(tried[-1][1], abs=1e-3)
    sizes = [len(strongest(experiment.graph, scores_UR, 2**n)) for n in range(len(tried))]
    assert [count for count, _ in tried] == sizes and len(sizes) > 1
    everything, tried = grown(experiment, torch.zeros_like(scores_UR), 100, 1.0)  # nothing is above 0: it ends
    assert everything == [] and tried[-1][0] == 0


def test_a_drawing_shows_the_strongest_edges_and_no_head_that_writes_nothing(monkeypatch: pytest.MonkeyPatch):
    graph = Graph(2, 4, 2)
    scores = {("embed", "m0"): 9.0, ("m0", "a1.kv1.v"): -8.0, ("a1.h3", "logits"): 7.0, ("embed", "logits"): 0.1}
    circuit = Circuit(dict(scores), {}, "0" * 64)
    drawn = layout(circuit, graph)
    assert [(edge["from"], edge["to"]) for edge in drawn.edges][-1] == ("embed", "m0")  # the strongest on top
    assert ("m0", "a1.h3") in {(edge["from"], edge["to"]) for edge in drawn.edges}
    assert set(drawn.places) == {"embed", "m0", "a1.h3", "logits"} and drawn.left_out == 0  # a1.h2 writes nothing
    assert drawn.places["m0"][0] > drawn.places["a1.h3"][0]
    assert all(0 < x < drawn.width and 0 < y < drawn.height for x, y in drawn.places.values())
    monkeypatch.setattr(circuit_page, "DRAWN", 3)
    assert layout(circuit, graph).left_out == 1 and len(layout(circuit, graph).edges) == 3


def test_a_circuit_file_is_refused_by_another_architecture(tmp_path: Path):
    model = induction_model()
    experiment = EdgeExperiment(model, induction_pairs())
    made = Circuit(dict.fromkeys(sorted(CIRCUIT), -1.5), architecture_of(model.config), "0" * 64, {"method": "acdc"})
    save_circuit(made, tmp_path / "circuit.json")
    again = load_circuit(tmp_path / "circuit.json", experiment.graph, model.config)
    assert again.edges == made.edges and again.nodes == ["embed", "a0.h0", "a1.h0"] and again.found == made.found
    other = tiny_lm(**SMALL)
    with pytest.raises(DataError, match="num_attention_heads 3 there, 4 here"):
        load_circuit(tmp_path / "circuit.json", experiment.graph, other.config)
    (tmp_path / "circuit.json").write_text('{"format": "bildung circuit 1"}')
    with pytest.raises(DataError, match="not a circuit file"):
        load_circuit(tmp_path / "circuit.json", experiment.graph, model.config)


def test_look_circuit_finds_measures_and_draws(place: Path):
    given = {"pairs": str(place / "pairs.jsonl"), "count": 2, "knockouts": 2}
    record = circuit_verb.circuit(place / "lm", place / "eap", circuit_verb.Settings(**given, edges=30, steps=2))
    made = json.loads((place / "eap/circuit.json").read_text())
    assert 0 < len(made["edges"]) <= 30 and made["measured"]["edges"] == len(made["edges"])
    assert record.measured["faithfulness"] == made["measured"]["faithfulness"]
    page = (place / "eap/circuit.html").read_text()
    assert "https://" not in page and page.count("<path") >= len(made["edges"])
    drawn = set(re.findall(r'data-node="([^"]+)"', page))
    assert set(made["nodes"]) | {"logits"} <= drawn
    assert (place / "eap/circuit.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (place / "eap/circuit.svg").read_text()[:2000]
    searched = circuit_verb.Settings(**given, method="acdc", metric="kl", threshold=1e-3, candidates=12)
    kept = circuit_verb.circuit(place / "lm", place / "acdc", searched)
    assert 0 < kept.measured["edges"] <= 12
    wanted = circuit_verb.Settings(**given, edges=5, faithful=0.5, steps=2)
    found = circuit_verb.circuit(place / "lm", place / "faithful", wanted)
    tried = json.loads((place / "faithful/circuit.json").read_text())["tried"]
    assert found.measured["faithfulness"] >= 0.5 and tried[-1][0] == found.measured["edges"]
    assert f'<td class="number">{tried[-1][0]}</td>' in (place / "faithful/circuit.html").read_text()
    with pytest.raises(SettingsError, match="a share in"):
        circuit_verb.circuit(place / "lm", place / "no", circuit_verb.Settings(**given, faithful=80))
    other = tiny_lm(**SMALL)
    bildung.save(other, place / "other")
    again = circuit_verb.Settings(**given, circuit=place / "eap/circuit.json")
    measured = circuit_verb.circuit(place / "other", place / "again", again)
    assert measured.measured["edges"] == len(made["edges"]) and "other weights" in measured.notes[0]


def test_grids_become_pages(place: Path, capsys: pytest.CaptureFixture[str]):
    given = {"pairs": str(place / "pairs.jsonl"), "count": 2}
    settings = patch_verb.Settings(**given, sites=("resid_pre",), heads=("attn.z", "attn.k"), at=("5",))
    record = patch_verb.patch(place / "lm", place / "patch", settings)
    numbers = json.loads((place / "patch/patch.json").read_text())
    assert [len(grid["values"][0]) for grid in numbers["grids"]] == [1, 4, 2]
    assert "https://" not in (place / "patch/patch.html").read_text() and "strongest attn.k" in record.measured
    assert record.notes == []
    record = patch_verb.patch(
        place / "lm", place / "one", patch_verb.Settings(**given | {"count": 1}, sites=(), at=("5",))
    )
    assert "more than the first 1 pairs" in record.notes[0] and record.notes[0] in capsys.readouterr().out
    assert "one run of the model" in (place / "patch/patch.html").read_text()
    first = patch_verb.Settings(**given, sites=(), heads=("attn.z",), attribution=True)
    patch_verb.patch(place / "lm", place / "first", first)
    assert "to first order" in (place / "first/patch.html").read_text()
    record = path_verb.path_patch(place / "lm", place / "path", path_verb.Settings(**given, receivers=("a1.h0.q",)))
    grid = json.loads((place / "path/path_patch.json").read_text())["grids"][0]
    assert grid["columns"] == ["0", "1", "2", "3", "mlp"] and grid["rows"] == ["0"]
    for nothing, says in ((), "no receiver"), (("a0.h0.q",), "no head and no MLP writes before"):
        with pytest.raises(SettingsError, match=says):
            path_verb.path_patch(place / "lm", place / "none", path_verb.Settings(**given, receivers=nothing))
    asked = trace_verb.Settings(prompt="ab cab", subject="ca", samples=3, window=1)
    record = trace_verb.trace(place / "lm", place / "trace", asked)
    assert 0 < record.measured["clean"] < 1 and (place / "trace/trace.png").exists()
    with pytest.raises(SettingsError, match=r"no layer has a site 'attn\.zz'.*mean 'attn\.z' or 'attn\.v'"):
        patching_grid(tiny_lm(**SMALL).model, random_pairs(), site="attn.zz")


def test_patching_everything_is_the_other_run_and_identity_changes_nothing():
    lm: LanguageModel = tiny_lm(**SMALL)
    pairs = random_pairs(length=5)
    for site in ("resid_pre", "resid_post"):
        grid = patching_grid(lm.model, pairs, site=site)
        assert (grid.recovered[-1, -1] == pytest.approx(1.0)) == (site == "resid_post")
        assert grid.columns == ["0", "1", "2", "3", "4"]
    noising = patching_grid(lm.model, pairs, site="resid_post", direction="noising")
    assert noising.recovered[-1, -1] == pytest.approx(0, abs=1e-5)
    assert noising.recovered[-1, 0] == pytest.approx(1)  # the last layer's other positions are read by nobody
    same = encode_pairs([{**ROWS[0], "corrupted": ROWS[0]["clean"]}], lm.tokenizer, "same")
    grid = patching_grid(lm.model, same, site="attn.probs", across="head")
    assert torch.allclose(grid.values, torch.tensor(grid.clean))
    with pytest.raises(DataError, match="nothing to recover"):
        _ = grid.recovered


def test_causal_trace_restores_what_the_noise_took():
    lm = tiny_lm(**SMALL, initializer_range=0.5)
    ids, subject = span_of(lm, "ab cab de", "cab")
    assert [lm.tokenizer.decode([token]) for token in ids[subject[0] : subject[1]]] in (list(" cab"), list("cab"))
    seen = causal_trace(lm.model, tokens(1, 6)[0].tolist(), (2, 4), samples=4, window=2)
    vectors = lm.model.model.embed_tokens.weight
    assert seen.sigma == pytest.approx(3 * vectors.std().item(), rel=1e-5)
    assert seen.restored["resid_post"][-1, -1] == pytest.approx(seen.clean)  # all that the logits read
    assert seen.restored["resid_post"][0, 0] == pytest.approx(seen.corrupted)  # before the subject nothing was lost
    assert abs(seen.clean - seen.corrupted) > 1e-4
    for given, says in (
        ({"samples": 0}, "samples = 0"),
        ({"window": -3}, "window = -3"),
        ({"deviations": float("nan")}, "deviations = nan"),
        ({"places": ("attn.probs",)}, r"attn.probs \(B N L S\) has nothing for each token"),  # its heads are no places
        ({"places": ()}, "nothing to put back"),
    ):
        with pytest.raises(SettingsError, match=says):
            causal_trace(lm.model, [5, 6, 7], (0, 1), **given)
    again = causal_trace(lm.model, tokens(1, 6)[0].tolist(), (2, 4), samples=4, window=1, places=("mlp.out",))
    assert not torch.allclose(again.restored["mlp.out"], seen.restored["mlp.out"])
    with pytest.raises(DataError, match="not in the prompt"):
        span_of(lm, "ab", "zz")


def test_pairs_that_do_not_line_up_are_listed(place: Path):
    lm = bildung.load(place / "lm")
    bad = [
        {**ROWS[0], "corrupted": "longer than that"},
        {**ROWS[0], "answers": ["two"]},
        {"clean": "ab"},
        {**ROWS[0], "places": {"end": 99}},
        {**ROWS[0], "extra": 1},
    ]
    pairs = encode_pairs([*ROWS, *bad], lm.tokenizer, "mine")
    assert len(pairs.rows) == 2 and len(pairs.dropped) == 5
    for text, said in zip(
        pairs.dropped, ("must match", "must be one", "no corrupted", "outside", "unknown"), strict=True
    ):
        assert said in text and text.startswith("row ")
    with pytest.raises(DataError, match="no pair can be used"):
        encode_pairs(bad, lm.tokenizer, "mine")
    with pytest.raises(DataError, match="as one token"):  # bytes have no whole names
        make_rows("ioi", lm.tokenizer, 4)
    with pytest.raises(DataError, match="as one token"):
        pairs_verb.pairs(place / "lm", place / "out", pairs_verb.Settings(task="agreement"))

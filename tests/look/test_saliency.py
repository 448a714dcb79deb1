"""Saliency: the axioms of its methods, on language models and classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bildung
from bildung.core.errors import DataError
from bildung.look import saliency as operation
from bildung.look.asked import Asked
from bildung.look.contributions.input_attribution import (
    gradient_x_input,
    integrated_gradients,
    outputs,
    rollout,
    token_vector,
)
from bildung.look.saliency import explain
from bildung.model.taps import intervene, observe
from tests.contract.test_families import made
from tests.model.tiny import tiny_lm
from tests.model.tiny_encoder import tiny_encoder

IDS = [5, 9, 17, 4, 22]
LABELS = {"num_labels": 3, "id2label": {"0": "bad", "1": "middling", "2": "good"}}


def classifier():
    return tiny_encoder("BertForSequenceClassification", initializer_range=0.2, id2label=LABELS["id2label"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "rnn", "classifier"])
def test_integrated_gradients_are_complete(name: str) -> None:
    model = classifier().model if name == "classifier" else made(name).model
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        found = integrated_gradients(model, IDS, 2, points=256)
        assert found.value is not None and found.baseline is not None and found.gap is not None
        explained = found.value - found.baseline
        assert found.scores_L.sum().item() == pytest.approx(explained, abs=0.01 * abs(explained) + 1e-3)
        assert found.gap == pytest.approx(explained - found.scores_L.sum().item())
        with torch.no_grad():
            assert found.value == pytest.approx(outputs(model, torch.tensor([IDS]))[0, 2].item(), abs=1e-5)
    few = integrated_gradients(model, IDS, 2, points=1)
    assert few.gap is not None and abs(few.gap) > abs(found.gap)


def test_where_the_baseline_is_the_text_itself_nothing_is_explained() -> None:
    lm = tiny_lm()
    found = integrated_gradients(lm.model, [5, 5, 5], 2, baseline_D=token_vector(lm, 5))
    assert (found.scores_L == 0).all() and found.value == pytest.approx(found.baseline, abs=1e-5)


def test_gradient_x_input_is_the_slope_at_the_input() -> None:
    model = made("llama").model
    expected = gradient_x_input(model, IDS, 7).scores_L
    torch.testing.assert_close(
        gradient_x_input(model.requires_grad_(False), IDS, 7).scores_L, expected, atol=1e-5, rtol=1e-4
    )
    for place in (0, 3):
        values = []
        for factor in (1.01, 0.99):
            with torch.no_grad(), intervene(model, {f"embed[:, {place}]": lambda x, f=factor: x * f}):
                values.append(outputs(model, torch.tensor([IDS]))[0, 7].item())
        assert (values[0] - values[1]) / 0.02 == pytest.approx(expected[place].item(), rel=0.02, abs=1e-3)


def test_rollout_multiplies_the_layers_and_keeps_the_mass() -> None:
    model = classifier().model
    with observe(model, "*.attn.probs") as seen, torch.no_grad():
        model.hidden(torch.tensor([IDS]))
    first, second = (seen[f"layers.{n}.attn.probs"][0].mean(0).double() for n in range(2))
    eye = torch.eye(5, dtype=torch.float64)
    found = rollout(model, IDS)
    torch.testing.assert_close(found, (second + eye) @ (first + eye) / 4, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert (rollout(made("llama").model, IDS).triu(1) == 0).all()
    with pytest.raises(DataError, match="no attention to roll out"):
        rollout(made("rnn").model, IDS)


def test_the_page_targets_and_what_is_refused(tmp_path: Path) -> None:
    lm = classifier()
    place = bildung.save(lm, tmp_path / "lm")
    settings = operation.Settings(prompt="the cat sat <on> the mat", target="good", baseline="[PAD]")
    operation.saliency(place, tmp_path / "out", settings)
    numbers = json.loads((tmp_path / "out" / "saliency.json").read_text(encoding="utf-8"))
    assert numbers["target"] == "good" and set(numbers["methods"]) == set(operation.METHODS)
    found = explain(lm, "the cat sat <on> the mat", target=2, baseline="[PAD]")
    assert numbers["methods"]["rollout"]["scores"] == pytest.approx(
        found.methods["rollout"].scores_L.tolist(), rel=1e-3
    )
    html = (tmp_path / "out" / "saliency.html").read_text(encoding="utf-8")
    assert "integrated gradients" in html and "speaks for it" in html and "do not add up" not in html
    rough = operation.Settings(prompt="the cat sat <on> the mat", methods=("integrated_gradients",), points=1)
    record = operation.saliency(place, tmp_path / "rough", rough)
    assert "do not add up" in (tmp_path / "rough" / "saliency.html").read_text(encoding="utf-8")
    assert any("the integral misses" in note for note in record.notes)
    with pytest.raises(DataError, match="'best' is no class of this model; bad, middling, good are"):
        explain(lm, "the cat", target="best")
    with pytest.raises(DataError, match=r"'rolout' is no method; did you mean 'rollout'"):
        explain(lm, "the cat", methods=("rolout",))  # type: ignore[arg-type]
    said = explain(tiny_lm(), "abc", target="d", methods=("gradient_x_input",))
    assert said.name == "d" and len(said.methods["gradient_x_input"].scores_L) == len(said.tokens)
    with pytest.raises(DataError, match="exactly one mask token"):
        explain(tiny_encoder("BertForMaskedLM"), "the cat")
    with pytest.raises(DataError, match="no class, no next token and no masked"):
        explain(tiny_encoder("BertModel"), "the cat")
    assert set(explain(made("rnn"), IDS).methods) == {"gradient_x_input", "integrated_gradients"}


def test_a_masked_token_and_an_answer_to_a_source_are_explained() -> None:
    lm = tiny_encoder(initializer_range=0.3)
    found = explain(lm, "the [MASK] sat on a mat", points=256)
    with torch.no_grad():
        logits_V = lm.model(torch.tensor([found.tokens]))[0, 2]
    assert found.labels[0] == "[CLS]" and found.labels[2] == "[MASK]" and found.target == int(logits_V.argmax())
    integral = found.methods["integrated_gradients"]
    assert integral.value == pytest.approx(float(logits_V.max()), abs=1e-5)
    assert integral.scores_L.sum().item() == pytest.approx(integral.value - (integral.baseline or 0), abs=0.02)
    for family in ("t5", "bart", "rnn_seq2seq"):
        lm = made(family)
        source, answer = [5, 6, 7, 8, 257], [258, 9, 10]
        found = explain(lm, source, answer=answer, points=256)
        with torch.no_grad():
            value = lm.model(torch.tensor([source]), torch.tensor([answer]))[0, -1].max().item()
        integral = found.methods["integrated_gradients"]
        assert found.tokens == source + answer and integral.value == pytest.approx(value, abs=1e-4)
        explained = value - (integral.baseline or 0)
        assert integral.scores_L.sum().item() == pytest.approx(explained, abs=0.01 * abs(explained) + 1e-3)
        assert integral.scores_L[:5].abs().max() > 1e-4  # the source speaks too
        if family != "rnn_seq2seq":
            flow_I = found.methods["rollout"].scores_L
            assert flow_I.sum().item() == pytest.approx(1) and (flow_I[:5] > 0).all()


def test_rollout_through_cross_attention_by_hand() -> None:
    model = made("t5").model
    question = Asked(model, [258, 9])
    with observe(model, "*.probs") as seen, torch.no_grad():
        question.logits(torch.tensor([IDS]))
    probs = {name: seen[name][0].mean(0).double() for name in seen}
    eye = torch.eye(7, dtype=torch.float64)
    read, flow = eye[:5], eye[5:]
    for n in range(2):
        read = (probs[f"encoder.layers.{n}.attn.probs"] @ read + read) / 2
    for n in range(2):
        flow = (probs[f"decoder.layers.{n}.attn.probs"] @ flow + flow) / 2
        flow = (probs[f"decoder.layers.{n}.cross.probs"] @ read + flow) / 2
    torch.testing.assert_close(rollout(question, IDS), flow, atol=1e-6, rtol=1e-6)

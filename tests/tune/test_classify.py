"""A classifier on top of an encoder: it learns, keeps what it was given, and transformers opens it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bildung
from bildung.core.errors import DataError, SettingsError
from bildung.core.settings import resolve
from bildung.tune.classify import Settings, balanced, classify, read
from tests.contract.test_families import made
from tests.model.tiny_encoder import tiny_encoder

FAMILIES = {
    "BertForPreTraining": {},
    "BertModel": {},
    "RobertaModel": {"model_type": "roberta"},
}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Whether a text speaks of a cat or of a dog; two thirds are of cats."""
    draw = random.Random(0)
    made = []
    for number in range(120):
        animal = "dog" if number % 3 == 0 else "cat"
        rest = draw.choices("the sat ran on mat big small red saw a".split(), k=6)
        made.append({"text": " ".join([*rest[:3], animal, *rest[3:]]), "label": animal})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    return str(path)


def given(rows: str, **other: Any) -> Settings:
    common = {"data": rows, "held_out": 30, "steps": 60, "learning_rate": 3e-3, "precision": "fp32", "max_length": 32}
    return resolve(Settings, {**common, **other})


@pytest.mark.parametrize("architecture", FAMILIES)
def test_it_learns_and_is_opened_by_transformers(
    architecture: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = bildung.save(tiny_encoder(architecture, **FAMILIES[architecture]), tmp_path / "source")
    record = classify(source, tmp_path / "out", given(rows))
    measured = record.measured
    assert measured["accuracy"] > 0.95 > 0.8 > measured["majority_accuracy"] and measured["majority_class"] == "cat"
    assert measured["test_texts"] == 30 and f"{measured['majority_accuracy']:.3f}" in capsys.readouterr().out
    lm = bildung.load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog"} and config["architectures"][0].endswith(
        "SequenceClassification"
    )
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[2, 40, 41, 42, 3]])
    with torch.no_grad():
        assert torch.allclose(peer(tokens).logits, lm.model.classify(lm.model.hidden(tokens)), atol=1e-4)


def test_what_is_kept_and_what_starts_at_random(rows: str, tmp_path: Path) -> None:
    source = bildung.save(tiny_encoder("BertForPreTraining"), tmp_path / "source")
    record = classify(source, tmp_path / "out", given(rows, steps=1, learning_rate=1e-12))
    assert "started at random: classifier; left out: lm_head, nsp_head, transform" in " ".join(record.notes)
    before, after = bildung.load(source).model, bildung.load(tmp_path / "out").model
    kept = {name: p for name, p in before.named_parameters() if name.startswith(("model.", "pooler."))}
    assert all(torch.allclose(p, after.get_parameter(name), atol=1e-6) for name, p in kept.items())
    again = classify(tmp_path / "out", tmp_path / "more", given(rows, steps=40))
    assert not any("at random" in note for note in again.notes)


def test_a_test_set_of_its_own(rows: str, tmp_path: Path) -> None:
    source = bildung.save(tiny_encoder("BertModel"), tmp_path / "source")
    other = tmp_path / "test.jsonl"
    other.write_text(
        "\n".join(json.dumps({"text": f"a big {one}", "label": one}) for one in ("dog", "cat", "dog", "dog"))
    )
    record = classify(source, tmp_path / "out", given(rows, test=str(other), held_out=0))
    assert record.measured["test_texts"] == 4 and record.measured["majority_accuracy"] == 0.25
    other.write_text('{"text": "a", "label": "bird"}\n{"text": "a", "label": "cat"}')
    with pytest.raises(DataError, match="'bird' is none of the 2 known"):
        classify(source, tmp_path / "no", given(rows, test=str(other)))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_decoder_learns_from_its_last_token(method: str, rows: str, tmp_path: Path, tiny_lm_directory: Path) -> None:
    record = classify(tiny_lm_directory, tmp_path / "out", given(rows, method=method, learning_rate=1e-2, balance=True))
    measured = record.measured
    assert measured["accuracy"] > 0.85 > measured["majority_accuracy"]
    assert sum(map(sum, measured["confusion"])) == 30 and 0 <= measured["ece"] < 0.5 and len(measured["per_class"]) == 2
    assert any("started at random: score; left out: lm_head" in note for note in record.notes)
    lm = bildung.load(tmp_path / "out")
    assert lm.config.kind == "classifier" and not any(linear.deltas for linear in lm.model.linears().values())
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[0, 40, 41, 42, 43]])
    with torch.no_grad():
        assert torch.allclose(peer(tokens).logits, lm.model(tokens), atol=1e-4)
    again = classify(tmp_path / "out", tmp_path / "again", given(rows, steps=1, learning_rate=1e-12))
    assert again.measured["accuracy"] == pytest.approx(measured["accuracy"], abs=0.05)
    assert not any("at random" in note for note in again.notes)


def test_a_rare_class_counts_as_much(rows: str) -> None:
    data = read(given(rows), rows, None)
    cat, dog = balanced(data)
    assert cat * data.labels.count(0) == pytest.approx(dog * data.labels.count(1)) == pytest.approx(len(data) / 2)


def test_what_is_refused(rows: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an encoder or a decoder is needed"):
        classify(bildung.save(made("t5"), tmp_path / "t5"), tmp_path / "out", given(rows))
    source = bildung.save(tiny_encoder("BertModel"), tmp_path / "source")
    with pytest.raises(SettingsError, match="needs texts to measure on"):
        classify(source, tmp_path / "out", given(rows, held_out=0, evaluate_every=5))
    with pytest.raises(DataError, match="at least one must stay"):
        classify(source, tmp_path / "out", given(rows, held_out=120))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bitfit"])
def test_the_encoder_learns_by_other_methods_and_the_result_is_ordinary(method: str, rows: str, tmp_path: Path) -> None:
    source = bildung.save(tiny_encoder("BertModel"), tmp_path / "source")
    chosen = {"method": "lora", "lora": {"rank": 4, "dora": True}} if method == "dora" else {"method": method}
    record = classify(source, tmp_path / "out", given(rows, learning_rate=1e-2, **chosen))
    assert record.measured["loss_last"] < record.measured["loss_first"] - 0.01
    if method in ("lora", "dora"):  # the others cannot turn this encoder's random features into a word's meaning
        assert record.measured["accuracy"] > 0.8 > record.measured["majority_accuracy"]
    base = bildung.load(source).model
    assert record.measured["trainable_parameters"] < sum(p.numel() for p in base.parameters()) / 2
    lm = bildung.load(tmp_path / "out")
    assert not lm.added and not any(linear.deltas for linear in lm.model.linears().values())
    same = torch.equal(lm.model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert same and not torch.equal(lm.model.state_dict()[MOVED[method]], base.state_dict()[MOVED[method]])
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[2, 40, 41, 42, 3]])
    with torch.no_grad():
        assert torch.allclose(peer(tokens).logits, lm.model.classify(lm.model.hidden(tokens)), atol=1e-4)


MOVED = {
    "lora": "model.layers.0.mlp.up_proj.base.weight",
    "dora": "model.layers.0.mlp.up_proj.base.weight",
    "ia3": "model.layers.0.mlp.down_proj.base.weight",
    "bitfit": "model.layers.0.mlp.up_proj.bias",
}


def test_settings_of_another_method_are_refused(rows: str, tmp_path: Path) -> None:
    source = bildung.save(tiny_encoder("BertModel"), tmp_path / "source")
    with pytest.raises(SettingsError, match="settings of lora were given, and method is 'full'"):
        classify(source, tmp_path / "out", given(rows, lora={"rank": 4}))

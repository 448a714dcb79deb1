"""The circuits page and the induction look: a circuit set by hand is named and ablated; pages hold the arrays."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bildung
from bildung.core.errors import DataError
from bildung.data import repeats
from bildung.look import circuits, induction
from bildung.look.attention_heads.head_weights import head_weights
from bildung.look.induction import Settings, circuit
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.pretrain import causal
from tests.look.induction_model import INDUCTION, PREVIOUS, induction_lm
from tests.model.tiny import tiny_lm


def test_the_page_of_circuits_holds_the_arrays(tmp_path: Path) -> None:
    bildung.save(tiny_lm(), tmp_path / "m")
    record = circuits.circuits(tmp_path / "m", tmp_path / "out", circuits.Settings(distances=(1, 2)))
    page = (tmp_path / "out/circuits.html").read_text()
    arrays = load_file(tmp_path / "out/circuits.safetensors")
    assert arrays["K"].shape == (12, 12) and arrays["OV copying"].shape == (2, 6)
    assert f"<td>{arrays['QK matching'][1, 3]:.3f}</td>" in page and "https://" not in page
    layers = head_weights(bildung.load(tmp_path / "m").model, distances=(1, 2))
    assert torch.allclose(arrays["norm of QK"][1], layers[1].qk.dense().norm(dim=(-2, -1)), rtol=1e-4)
    both = [head_weights(bildung.load(tmp_path / "m").model, distances=(d,))[1].qk.dense() for d in (1, 2)]
    assert torch.allclose(layers[1].qk.dense(), (both[0] + both[1]) / 2, atol=1e-5)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))  # type: ignore[union-attr]
    sent = data["matrices"]["Q"]
    steps = torch.frombuffer(bytearray(base64.b64decode(sent["bytes"])), dtype=torch.uint8).view(12, 12)
    values = sent["low"] + steps / 255 * (sent["high"] - sent["low"])
    assert torch.allclose(values[6:, :6], arrays["Q"][6:, :6], atol=(sent["high"] - sent["low"]) / 255)
    best = data["pairs"]["V"][0]
    assert best["score"] == pytest.approx(float(arrays["V"][6:, :6].max()), abs=1e-4)
    assert circuits.words(best) == record.measured["strongest V-composition"] and circuits.words(best) in page


def test_the_circuit_set_by_hand_is_named_and_each_head_ablated(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = induction_lm()
    ordinary = induction.repeated_tokens

    def of_this_vocabulary(*given: object, **settings: object) -> object:  # the 32 tokens, BOS among the first
        monkeypatch.setattr(type(lm.tokenizer), "bos_id", 0)
        return ordinary(*given, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(induction, "repeated_tokens", of_this_vocabulary)
    found = circuit(lm, Settings(stretch=15, rows=4))
    assert tuple(found["induction_head"]) == INDUCTION and tuple(found["previous_head"]) == PREVIOUS
    assert found["score"] > 0.95 and found["k_composition"] > 0.07 and found["score_without"] < 0.3
    worth = {(one["layer"], one["head"]): one["score"] for one in found["ablations"]}
    assert set(worth) == {(0, 0), (0, 1)}
    assert worth[PREVIOUS] == pytest.approx(found["score_without"]) and worth[0, 0] == pytest.approx(found["score"])


def test_training_is_watched_and_drawn(tmp_path: Path) -> None:
    """From words drawn at random to a model, its log, and the picture over its steps."""
    text = tmp_path / "words.jsonl"
    text.write_text(json.dumps({"text": " ".join(letter * (4 + i) for i, letter in enumerate("abcdefgh"))}) + "\n")
    given = repeats.Settings(words=8, length=12, shortest=3, longest=5, rows=9)
    repeats.repeats(str(text), tmp_path / "text", given)
    rows = [json.loads(line)["text"].split() for line in (tmp_path / "text/train.jsonl").read_text().splitlines()]
    for row in rows:
        size = row.index(row[0], 1)
        assert 3 <= size <= 5 and len(set(row[:size])) == size and len(row) == 12
        assert all(row[i] == row[i - size] for i in range(size, 12))
    bildung.save(tiny_lm(), tmp_path / "words")
    (tmp_path / "words/config.json").unlink()
    shape = dict(model_type="bildung", mlp=False, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    settings = causal.Settings(
        data=str(tmp_path / "text"), held_out=2, baseline_order=0, model={**shape, "max_position_embeddings": 32},
        max_length=16, batch_size=2, steps=2, precision="fp32", induction_every=1,
    )  # fmt: skip
    causal.causal(tmp_path / "words", tmp_path / "model", settings)
    induction.induction(tmp_path / "model", tmp_path / "look", Settings(rows=2))
    found = json.loads((tmp_path / "look/induction.json").read_text())
    course = [row for row in found["course"] if "induction/score" in row]
    assert len(course) >= 2 and {"step", "induction/first_loss", "induction/in_context"} <= set(course[-1])
    assert (tmp_path / "look/induction.png").read_bytes()[:4] == b"\x89PNG"
    config = from_dict(dict(model_type="rnn", vocab_size=260, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(DataError, match="no attention to text"):
        circuit(LanguageModel(build(config), tiny_lm().tokenizer, config))

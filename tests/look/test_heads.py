"""The atlas: the page is complete and safe, its numbers are the arrays, and it works on what is tuned and quantized."""

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
from bildung.look import heads as operation
from bildung.look.heads import Settings, head_atlas
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from tests.contract.test_families import CONFIGS
from tests.model.tiny import tiny_lm


def test_the_atlas_is_a_page_numbers_and_arrays(tmp_path: Path) -> None:
    bildung.save(tiny_lm(), tmp_path / "m<b>")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "one two three four five " * 9}) + "\n" for _ in range(3)))
    settings = Settings(stretch=9, copies=3, rows=2, data=str(text), length=40)
    record = operation.heads(tmp_path / "m<b>", tmp_path / "out", settings)
    page = (tmp_path / "out/heads.html").read_text()
    assert "<b>" not in re.sub(r"<b>[^<]*</b>", "", page) and "https://" not in page
    numbers = json.loads((tmp_path / "out/heads.json").read_text())
    arrays = load_file(tmp_path / "out/heads.safetensors")
    assert set(arrays) == set(numbers["scores"]) == set(operation.MEANING)
    again = head_atlas(bildung.load(tmp_path / "m<b>"), settings)
    for name, scores in again.scores.items():
        assert torch.equal(arrays[name], scores) and scores.shape == (2, 6)
        assert f"<td>{scores[1, 3]:.3f}</td>" in page  # the table is there without JavaScript
    assert numbers["key_value_heads"] == [0, 0, 0, 1, 1, 1]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))
    sent = torch.frombuffer(bytearray(base64.b64decode(data["patterns"])), dtype=torch.uint8)
    length = len(numbers["labels"])
    assert length == 1 + 2 * 9 and sent.numel() == 2 * 6 * length**2
    assert (
        numbers["in_context"]["rows"] == 15
        and "nats (token 39 minus 4)" in record.measured["in-context-learning score"]
    )


def test_encoders_have_the_scores_that_mean_something_and_others_are_refused() -> None:
    def made(family: str) -> LanguageModel:
        config = from_dict({"model_type": family, **CONFIGS[family]})
        return LanguageModel(build(config, seed=3).eval(), tiny_lm().tokenizer, config)

    atlas = head_atlas(made("bert"), Settings(stretch=9, rows=2))
    assert list(atlas.scores) == ["induction", "previous token", "duplicate token", "first token"]
    assert not len(atlas.seen.loss_L)
    encoder = head_atlas(made("t5"), Settings(stretch=9, rows=2, stack="encoder"))
    decoder = head_atlas(made("t5"), Settings(stretch=9, rows=2))
    assert list(encoder.scores) == list(atlas.scores) and set(decoder.scores) == set(operation.MEANING)
    assert len(decoder.seen.loss_L) == 19 and not torch.equal(encoder.scores["induction"], decoder.scores["induction"])
    for family in ("rnn_seq2seq", "vit", "rnn"):
        with pytest.raises(DataError, match=r"stack|attention"):
            head_atlas(made(family), Settings(stretch=9, rows=2))

"""Activations on disk: the model's own numbers, resumable, bound to the weights they were seen on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import bildung
from bildung.core.errors import ModelFileError, NoSuchSite, RecordError, SettingsError
from bildung.look import cache as operation
from bildung.look.cache import Activations, Settings
from bildung.model.taps import observe
from tests.model.tiny import tiny_lm

TEXTS = ["abc", "a longer text", "b", "four words are here", "and five of them here"]
SITES = ("layers.*.resid_post", "layers.1.attn.z[:, -1, 2]", "layers.0.attn.result[N=1|3]")


def test_a_cache_holds_what_the_model_does_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    place = bildung.save(tiny_lm(), tmp_path / "lm")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    settings = Settings(data=str(data), sites=SITES, batch_tokens=30, max_length=16)
    read, calls = operation._read, []

    def stops(lm, texts, patterns):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(lm, texts, patterns)

    monkeypatch.setattr(operation, "_read", stops)
    with pytest.raises(KeyboardInterrupt):
        operation.cache(place, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    record = operation.cache(place, tmp_path / "out", settings)
    assert record.measured["texts of an earlier run"] == calls[0] > 0
    lm = bildung.load(place)
    found = Activations(tmp_path / "out", lm)
    assert found.sites == ("layers.0.attn.result", "layers.0.resid_post", "layers.1.attn.z", "layers.1.resid_post")
    assert isinstance(found["layers.0.resid_post"], np.memmap) and len(found.starts) == 6
    for number, text in enumerate(TEXTS):
        ids = lm.tokenizer.encode(text)[:16]
        with observe(lm.model, SITES) as seen, torch.no_grad():
            lm.model(torch.tensor([ids]))
        assert found.tokens[found.starts[number] : found.starts[number + 1]].tolist() == ids
        for site, x in seen.items():
            rows = torch.tensor(np.array(found.text(site, number)))
            expected = x[0, 0] if site == "layers.1.attn.z" else x[0]
            torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    other = bildung.load(bildung.save(tiny_lm(initializer_range=0.2), tmp_path / "other"))
    with pytest.raises(ModelFileError, match="other weights"):
        Activations(tmp_path / "out", other)
    for nothing in ({"sites": ()}, {"max_length": 0}, {"batch_tokens": 0}):
        with pytest.raises(SettingsError, match="at least 4 and batch_tokens at least 1"):
            operation.cache(place, tmp_path / "none", Settings(**{"data": str(data), "sites": ("embed",), **nothing}))
    with pytest.raises(RecordError, match="no cache"):
        Activations(place)
    with pytest.raises(NoSuchSite, match=r"it holds layers\.0"):
        found["embed"]
    for site, says in (
        ("layers.0.attn.probs", "as wide as the text"),
        ("embed[1]", "chooses rows"),
        ("logits", "above"),
    ):
        with pytest.raises(NoSuchSite, match=says):
            operation.cache(place, tmp_path / "no", Settings(data=str(data), sites=(site,)))

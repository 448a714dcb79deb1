"""An operation that is told how its steps compute: float16, 8 bits, and what is computed again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from bildung.model.fp8 import Fp8Dense
from bildung.train.loss_scale import START
from bildung.tune.lora import Settings, lora


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_float16_scales_its_loss(tiny_lm_directory, given, tmp_path):
    record = lora(tiny_lm_directory, tmp_path / "out", Settings(**{**given, "precision": "fp16"}))
    found = rows(tmp_path / "out")
    assert record.settings["precision"] == "fp16" and found[0]["loss_scale"] == START
    assert not any(row.get("overflow") for row in found) and found[-1]["loss"] < found[0]["loss"]


def test_8_bits_are_used_in_training_and_nowhere_else(tiny_lm_directory, given, tmp_path, monkeypatch):
    seen, forward = [], Fp8Dense.forward
    monkeypatch.setattr(Fp8Dense, "forward", lambda self, *x: seen.append(self.training) or forward(self, *x))
    lora(tiny_lm_directory, tmp_path / "out", Settings(**{**given, "precision": "fp8"}))
    found = rows(tmp_path / "out")
    assert all(seen) and len(seen) == 3 * 14 and "loss_scale" not in found[0]
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.parametrize("recompute", ["attention", "mlp", "blocks"])
def test_what_is_computed_again_gives_the_same_adapter(tiny_lm_directory, given, tmp_path, recompute):
    for name in ("none", recompute):
        lora(tiny_lm_directory, tmp_path / name, Settings(**given, dropout=0.2, recompute=name))
    plain, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("none", recompute))
    assert all(torch.equal(plain[key], again[key]) for key in plain) and plain.keys() == again.keys()

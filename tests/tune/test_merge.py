"""Merging: the same model in one piece, never in 4 bit, and how far it is from the adapter."""

from __future__ import annotations

import json

import pytest
import torch

import bildung
from bildung.core.errors import AdapterError
from bildung.evaluate.card import CardSettings
from bildung.model.linear import Dense, replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import Int8, Nf4
from bildung.model.store import load
from bildung.tune.lora import Settings as LoraSettings
from bildung.tune.lora import lora
from bildung.tune.merge import Settings, fold_deltas, merge


@pytest.fixture
def adapter(tiny_lm_directory, given, tmp_path):
    lora(tiny_lm_directory, tmp_path / "adapter", LoraSettings(**given, alpha=64))
    return tmp_path / "adapter"


def test_merged_equals_unmerged(adapter, tmp_path, logits):
    record = merge(adapter, tmp_path / "merged", Settings())
    merged = bildung.load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(bildung.load(adapter)), rtol=0, atol=1e-4)
    assert not any(linear.deltas for linear in merged.model.linears().values())
    found = record.measured["adapter_to_merged"]
    assert found["kl_mean"] < 1e-6 and found["max_logit_difference"] < 1e-3 and found["same_top"] > 0.999
    assert record.measured["merged_matrices"] == 14
    assert list(record.companions) == ["base"] and list(record.data) == ["mini:moby/moby.jsonl"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_type_can_be_chosen_and_is_said(adapter, tmp_path, dtype):
    record = merge(adapter, tmp_path / "merged", Settings(dtype=dtype, compare_texts=1))
    merged = bildung.load(tmp_path / "merged")
    assert {str(p.dtype) for p in merged.model.parameters()} == {f"torch.{dtype}"}
    assert any(f"written in {dtype}" in note for note in record.notes)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    exact = record.measured["adapter_to_merged"]["max_logit_difference"] < 1e-4
    assert exact == (dtype == "float32")


def test_the_sum_is_rounded_once(tiny_lm_directory):
    """bfloat16(W + BA) from float32, not bfloat16(W) + bfloat16(BA)."""
    lm = load(tiny_lm_directory, "bfloat16")
    linear = lm.model.linears()["model.layers.0.mlp.up_proj"]
    delta = LowRank(linear.in_features, linear.out_features, 4, 1.0)
    torch.nn.init.normal_(delta.lora_B, std=0.3)
    linear.deltas["default"] = delta
    expected = (linear.base.weight.float() + delta.weight()).bfloat16()
    fold_deltas(lm.model, torch.bfloat16)
    assert torch.equal(linear.base.weight, expected)


@pytest.mark.parametrize("kind", [Int8, Nf4])
def test_a_quantized_base_is_dequantized_and_stays_so(tiny_lm, given, tmp_path, logits, kind):
    replace_stores(tiny_lm.model, "all", lambda linear: kind.quantize(linear.base.dense()))
    base = bildung.save(tiny_lm, tmp_path / "base")
    lora(base, tmp_path / "adapter", LoraSettings(**given))
    record = merge(tmp_path / "adapter", tmp_path / "merged", Settings(dtype="float32"))
    merged = bildung.load(tmp_path / "merged")
    assert all(isinstance(linear.base, Dense) for linear in merged.model.linears().values())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert any("was quantized" in note and kind.__name__ in note for note in record.notes)
    torch.testing.assert_close(logits(merged), logits(bildung.load(tmp_path / "adapter")), rtol=0, atol=1e-4)


def test_a_full_model_has_nothing_to_merge(tiny_lm_directory, tmp_path):
    with pytest.raises(AdapterError, match="nothing to merge"):
        merge(tiny_lm_directory, tmp_path / "out", Settings())


def test_a_delta_on_a_tied_unembedding_is_refused(tiny_lm_directory, given, tmp_path):
    lora(tiny_lm_directory, tmp_path / "adapter", LoraSettings(**given, target="lm_head"))
    with pytest.raises(AdapterError, match="shares with its embedding"):
        merge(tmp_path / "adapter", tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


def test_cards_before_and_after_chain_from_step_to_step(tiny_lm_directory, given, tmp_path):
    """What was measured after one step is taken over as the next one's before."""
    card = CardSettings(tasks=("capitals",), limit=3, sample_prompts=(), dtype="float32")
    tuned = lora(tiny_lm_directory, tmp_path / "adapter", LoraSettings(**given, card=card))
    merged = merge(tmp_path / "adapter", tmp_path / "merged", Settings(card=card, compare_texts=1))
    assert tuned.before["fingerprint"] == tuned.after["fingerprint"] == merged.after["fingerprint"]
    assert list(tuned.before["tasks"]) == list(tuned.after["tasks"]) and tuned.before["tasks"]
    assert "change" in next(iter(tuned.after["tasks"].values()))
    assert merged.before["seconds"] == tuned.after["seconds"]  # the same measurement, not a second one
    assert merged.before["tasks"]["capitals"]["items"] == tuned.after["tasks"]["capitals"]["items"]

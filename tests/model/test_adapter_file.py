"""PEFT adapter directories from strangers: each number and shape is checked before it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bildung
from bildung.core.errors import AdapterError
from bildung.model.low_rank import LowRank
from tests.model.tiny import tiny_lm, tokens

TARGET = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{TARGET}.lora_A.weight", f"{TARGET}.lora_B.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of rank 4 on one matrix, beside its base."""
    bildung.save(tiny_lm(), tmp_path / "base")
    lm = bildung.load(tmp_path / "base")
    linear = lm.model.linears()["model.layers.0.self_attn.q_proj"]
    linear.deltas["edit"] = delta = LowRank(linear.in_features, linear.out_features, 4, 2.0)
    torch.nn.init.normal_(delta.lora_B)
    return bildung.save(lm, tmp_path / "adapter")


def change_config(directory: Path, **change: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": "8"}, "must be numbers"),
        ({"lora_alpha": None}, "must be numbers"),
        ({"lora_alpha": float("nan")}, "must be numbers"),
        ({"alpha_pattern": [1]}, "must be numbers"),
        ({"alpha_pattern": {"q_proj": "8"}}, "must be numbers"),
        ({"alpha_pattern": {".*q_proj": 8}}, "which is no matrix of the adapter"),
        ({"lora_dropout": 7}, r"lie in \[0, 1\)"),
        ({"use_rslora": "maybe"}, "true or false"),
        ({"base_model_name_or_path": 5}, "must be a path"),
        ({"base_model_name_or_path": "elsewhere"}, "not a model directory here"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"lora_alfa": 8}, "did you mean 'lora_alpha'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(adapter: Path, change: dict[str, Any], words: str) -> None:
    change_config(adapter, **change)
    with pytest.raises(AdapterError, match=words):
        bildung.load(adapter)


def test_unreadable_settings_are_refused(adapter: Path) -> None:
    for content in ("{", "[" * 100_000):
        (adapter / "adapter_config.json").write_text(content)
        with pytest.raises(AdapterError, match="cannot be read as JSON"):
            bildung.load(adapter)


def test_a_pattern_changes_the_strength_of_the_matrices_it_names(adapter: Path) -> None:
    with torch.no_grad():
        before = bildung.load(adapter).model(tokens())
        change_config(adapter, lora_alpha=99, alpha_pattern={"self_attn.q_proj": 8})
        assert torch.equal(bildung.load(adapter).model(tokens()), before)


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a number": (lambda t: t.update({A: torch.tensor(1.0)}), "belongs to another model"),
    "rank 0": (lambda t: t.update({A: torch.ones(0, 192), B: torch.ones(384, 0)}), "belongs to another model"),
    "another width": (lambda t: t.update({A: torch.ones(4, 64)}), "belongs to another model"),
    "whole numbers": (lambda t: t.update({A: torch.ones(4, 192, dtype=torch.int32)}), "not finite numbers"),
    "infinite": (lambda t: t[B].fill_(float("inf")), "not finite numbers"),
    "half a pair": (lambda t: t.pop(B), "only one of lora_A and lora_B"),
    "foreign": (lambda t: t.update(extra=torch.ones(1)), "neither a lora_A nor a lora_B"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused(adapter: Path, case: str) -> None:
    change, words = TENSORS[case]
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=words):
        bildung.load(adapter)

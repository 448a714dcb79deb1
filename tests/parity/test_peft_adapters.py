"""Adapters go both ways between here and `peft`, with equal logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bildung
from bildung.core.errors import AdapterError
from bildung.model.linear import deltas_off, match_linears
from bildung.model.low_rank import LowRank
from tests.model.test_linear import with_lora
from tests.model.tiny import tiny_lm, tokens


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return bildung.save(tiny_lm(), tmp_path / "base")


def peer_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(tokens()).logits


def make_adapter(base: Path, out: Path, **settings: Any) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}
    )
    tuned = peft.get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(out)
    return out


THEIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "two kinds": {"target_modules": ["q_proj", "down_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 11}},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("case", THEIRS)
def test_adapters_of_peft_load_here(case: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **THEIRS[case])
    lm = bildung.load(adapter)
    torch.testing.assert_close(lm.model(tokens()), peer_logits(base, adapter), atol=1e-5, rtol=1e-5)
    with deltas_off(lm.model, "default"):
        assert torch.equal(lm.model(tokens()), bildung.load(base).model(tokens()))


@pytest.mark.parametrize("stack", [1, 2])
def test_adapters_made_here_load_in_peft(stack: int, base: Path, tmp_path: Path) -> None:
    """Two deltas of different rank and scaling become one adapter of summed rank."""
    lm = bildung.load(base)
    with_lora(lm.model, "first", rank=3)
    if stack == 2:
        for linear in match_linears(lm.model, ("q_proj", "up_proj")).values():
            linear.deltas["second"] = LowRank(linear.in_features, linear.out_features, 5, scaling=0.7)
            torch.nn.init.normal_(linear.deltas["second"].lora_B, std=0.3)
    logits = lm.model(tokens())
    bildung.save(lm, tmp_path / "adapter")
    torch.testing.assert_close(peer_logits(base, tmp_path / "adapter"), logits, atol=1e-5, rtol=1e-5)
    again = bildung.load(tmp_path / "adapter")
    torch.testing.assert_close(again.model(tokens()), logits, atol=1e-5, rtol=1e-5)
    assert again.base == base or again.base.samefile(base)


def test_a_life_that_moved_finds_its_base(base: Path, tmp_path: Path) -> None:
    lm = bildung.load(base)
    with_lora(lm.model)
    (tmp_path / "life").mkdir()
    shutil.move(base, tmp_path / "life/base")
    lm.base = tmp_path / "life/base"
    bildung.save(lm, tmp_path / "life/tuned")
    (tmp_path / "life").rename(tmp_path / "moved")
    assert torch.equal(bildung.load(tmp_path / "moved/tuned").model(tokens()), lm.model(tokens()))


def change_config(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def rename_tensors(adapter: Path, old: str, new: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k.replace(old, new): t for k, t in tensors.items()}, adapter / "adapter_model.safetensors")


NO_LORA = dict.fromkeys(("r", "lora_alpha", "bias", "qalora_group_size", "init_lora_weights", "megatron_core"))
BAD = {
    "dora": (lambda a: change_config(a, use_dora=True), "has no lora_magnitude_vector"),
    "other method": (lambda a: change_config(a, peft_type="LOHA"), "peft_type = 'LOHA' is not supported"),
    "another's tensors": (lambda a: change_config(a, peft_type="IA3", **NO_LORA), "is no ia3_l"),
    "unknown key": (lambda a: change_config(a, lora_alhpa=3), "did you mean 'lora_alpha'"),
    "no base": (lambda a: change_config(a, base_model_name_or_path="gone"), "names the base model 'gone'"),
    "other matrix": (lambda a: rename_tensors(a, "q_proj", "query"), "does not have"),
    "one factor": (
        lambda a: rename_tensors(a, "layers.0.mlp.up_proj.lora_A", "layers.9.mlp.up_proj.lora_A"),
        "only one of|does not have",
    ),
    "not a factor": (lambda a: rename_tensors(a, "lora_A", "lora_C"), "neither a lora_A nor"),
    "magnitudes in a LoRA": (lambda a: rename_tensors(a, "lora_A", "lora_magnitude_vector"), "only one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_do_not_fit_are_refused(case: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    harm, message = BAD[case]
    harm(adapter)
    with pytest.raises(AdapterError, match=message):
        bildung.load(adapter)


def test_an_adapter_for_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    other = bildung.save(tiny_lm(hidden_size=96, intermediate_size=200), tmp_path / "other")
    change_config(adapter, base_model_name_or_path=str(other))
    with pytest.raises(AdapterError, match="belongs to another model"):
        bildung.load(adapter)

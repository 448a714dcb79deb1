"""Adapters cross over: what bildung writes, `peft` loads with equal logits, and the other way round."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

import bildung
from bildung.model.linear import match_linears
from bildung.tune.lora import Settings, lora
from bildung.tune.merge import Settings as MergeSettings
from bildung.tune.merge import merge

TOKENS_BL = torch.tensor([[5, 60, 7, 101, 33, 250], [9, 8, 77, 66, 55, 44]])
ASKED = {
    "every matrix": dict(),
    "rslora": dict(rslora=True, rank=3, alpha=5),
    "two kinds": dict(target=["q_proj", "v_proj"], rank=2),
    "one layer": dict(target="*.layers.1.*"),
    "dropout, bf16": dict(dropout=0.1, precision="bf16"),
}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"instruction": "What is the capital of France?", "output": "Paris."}) + "\n")
    return str(path)


def ours(directory):
    with torch.no_grad():
        return bildung.load(directory).model(TOKENS_BL)


def theirs(base, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(TOKENS_BL).logits


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_peft_loads_our_adapter(tiny_lm_directory, data, tmp_path, asked):
    settings = Settings(data=data, max_length=64, steps=3, learning_rate=3e-2, **{"precision": "fp32", **asked})
    lora(tiny_lm_directory, tmp_path / "adapter", settings)
    plain, tuned = theirs(tiny_lm_directory), theirs(tiny_lm_directory, tmp_path / "adapter")
    assert (plain - tuned).abs().max() > 0.05
    torch.testing.assert_close(ours(tmp_path / "adapter"), tuned, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules="all-linear", r=4, lora_alpha=3),
        dict(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=6, use_rslora=True),
        dict(
            target_modules=["q_proj", "up_proj"],
            r=4,
            lora_alpha=8,
            rank_pattern={"up_proj": 2},
            alpha_pattern={"up_proj": 7, "layers.0.self_attn.q_proj": 16},
        ),
    ],
    ids=["all linear", "rslora", "patterns"],
)
def test_we_load_pefts_adapter(tiny_lm_directory, tmp_path, config):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm_directory, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(TOKENS_BL).logits
    assert (expected - ours(tiny_lm_directory)).abs().max() > 0.05
    torch.testing.assert_close(ours(tmp_path / "adapter"), expected, rtol=0, atol=1e-5)


def test_the_merged_directory_opens_in_transformers(tiny_lm_directory, data, tmp_path):
    settings = Settings(data=data, max_length=64, steps=3, learning_rate=3e-2, precision="fp32")
    lora(tiny_lm_directory, tmp_path / "adapter", settings)
    merge(tmp_path / "adapter", tmp_path / "merged", MergeSettings(compare_texts=1))
    torch.testing.assert_close(theirs(tmp_path / "merged"), ours(tmp_path / "adapter"), rtol=0, atol=1e-4)


def test_all_means_what_pefts_all_linear_means(tiny_lm):
    """Every matrix but the unembedding."""
    config = transformers.AutoConfig.from_pretrained(tiny_lm.path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert names == set(match_linears(tiny_lm.model, "all"))

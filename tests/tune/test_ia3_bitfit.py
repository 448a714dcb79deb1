"""(IA)³ and BitFit as operations: what trains, what is written, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import bildung
from bildung.core.errors import NoSuchLinear, OutputError, SettingsError, TrainingError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.tune.bitfit import Settings as BitfitSettings
from bildung.tune.bitfit import add_bitfit, bitfit
from bildung.tune.ia3 import Options, Settings, add_ia3, ia3
from bildung.tune.lora import Settings as LoraSettings
from bildung.tune.lora import lora
from bildung.tune.merge import Settings as MergeSettings
from bildung.tune.merge import merge
from tests.conftest import tiny_tokenizer


@pytest.fixture
def gpt2_directory(tmp_path):
    sizes = dict(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256, n_inner=48, initializer_range=0.2)
    config = from_dict({"model_type": "gpt2", **sizes, "bos_token_id": 0, "eos_token_id": 2})
    return bildung.save(LanguageModel(build(config, 3).eval(), tiny_tokenizer(), config), tmp_path / "gpt2")


def test_ia3_starts_at_the_source_and_trains_a_number_per_feature(tiny_lm, logits):
    before = logits(tiny_lm)
    chosen = add_ia3(tiny_lm.model, Options())
    assert torch.equal(logits(tiny_lm), before)
    assert sorted({name.rsplit(".", 1)[-1] for name in chosen}) == ["down_proj", "k_proj", "v_proj"]
    trained = {name: p.numel() for name, p in tiny_lm.model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{name}.deltas.ia3.factor" for name in chosen}
    assert sum(trained.values()) == 2 * (16 + 16 + 48)


def test_ia3_tuned_loaded_and_merged(tiny_lm_directory, given, tmp_path, logits):
    record = ia3(tiny_lm_directory, tmp_path / "ia3", Settings(**{**given, "learning_rate": 5e-2}))
    assert record.measured["loss_last"] < record.measured["loss_first"]
    merge(tmp_path / "ia3", tmp_path / "merged", MergeSettings())
    tuned, merged = logits(bildung.load(tmp_path / "ia3")), logits(bildung.load(tmp_path / "merged"))
    torch.testing.assert_close(merged, tuned, atol=1e-4, rtol=1e-4)
    assert (tuned - logits(bildung.load(tiny_lm_directory))).abs().max() > 1e-2


def test_ia3_refuses_what_it_cannot_scale(tiny_lm_directory, given, tmp_path):
    for wrong, error, words in (
        (dict(outputs=("key",)), NoSuchLinear, "no weight matrix"),
        (dict(outputs=("down_proj",)), SettingsError, "in outputs and in inputs"),
        (dict(outputs=(), inputs=()), SettingsError, "both empty"),
    ):
        with pytest.raises(error, match=words):
            ia3(tiny_lm_directory, tmp_path / "out", Settings(**given, **wrong))
    lora(tiny_lm_directory, tmp_path / "lora", LoraSettings(**given, rank=2))
    with pytest.raises(OutputError, match="holds one type"):  # before it trains
        ia3(tmp_path / "lora", tmp_path / "out", Settings(**given))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bitfit_trains_biases_alone_and_is_an_adapter(gpt2_directory, given, tmp_path, logits, precision):
    record = bitfit(gpt2_directory, tmp_path / "bitfit", BitfitSettings(**{**given, "precision": precision}))
    assert record.measured["loss_last"] < record.measured["loss_first"]
    lm, base = bildung.load(tmp_path / "bitfit"), bildung.load(gpt2_directory)
    before = dict(base.model.named_parameters())
    changed = {name for name, p in lm.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.endswith(".bias") for name in changed)
    assert record.measured["trainable_parameters"] == sum(
        p.numel() for name, p in before.items() if name.endswith(".bias")
    )
    tensors = load_file(tmp_path / "bitfit/adapter_model.safetensors")
    assert "base_model.model.transformer.h.0.attn.c_attn.bias" in tensors
    assert json.loads((tmp_path / "bitfit/adapter_config.json").read_text())["peft_type"] == "BITFIT"
    bildung.save(lm, tmp_path / "again")
    assert torch.equal(logits(bildung.load(tmp_path / "again")), logits(lm))
    merge(tmp_path / "bitfit", tmp_path / "merged", MergeSettings())
    merged = bildung.load(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(lm)) and not merged.model.retrained


def test_bitfit_refuses_a_model_without_biases_and_a_second_method(tiny_lm_directory, gpt2_directory, given, tmp_path):
    with pytest.raises(TrainingError, match="this llama has no biases"):
        bitfit(tiny_lm_directory, tmp_path / "out", BitfitSettings(**given))
    bitfit(gpt2_directory, tmp_path / "bitfit", BitfitSettings(**given))
    with pytest.raises(OutputError, match=r"retrained biases.*merge"):
        lora(tmp_path / "bitfit", tmp_path / "out", LoraSettings(**given))


def test_a_bitfit_of_another_model_is_refused(gpt2_directory, tmp_path):
    lm = bildung.load(gpt2_directory)
    add_bitfit(lm.model, BitfitSettings(data="none"))
    bildung.save(lm, tmp_path / "bitfit")
    path = tmp_path / "bitfit/adapter_model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(path)
    for harm, words in (
        ({"base_model.model.nothing.bias": torch.ones(3)}, "no bias of this model"),
        ({"base_model.model.transformer.ln_f.bias": torch.ones(3)}, "has shape"),
        ({"base_model.model.transformer.ln_f.bias": torch.full((32,), torch.nan)}, "not finite"),
    ):
        save_file({**tensors, **harm}, path)
        with pytest.raises(bildung.core.errors.AdapterError, match=words):
            bildung.load(tmp_path / "bitfit")

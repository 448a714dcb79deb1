"""Prompt tuning: where it starts, what trains, what is written."""

from __future__ import annotations

import json

import pytest
import torch

import bildung
from bildung.core.errors import AdapterError, SettingsError
from bildung.core.record import read_record
from bildung.model.virtual import virtual_of
from bildung.tune.lora import Settings as LoraSettings
from bildung.tune.lora import lora
from bildung.tune.merge import Settings as MergeSettings
from bildung.tune.merge import merge
from bildung.tune.prompt import Settings, add_prompt, prompt

ROW = torch.tensor([[5, 60, 7, 101, 33, 250]])


def test_it_starts_as_the_model_that_reads_the_text(tiny_lm):
    text = "The capital of Italy is"
    ids = tiny_lm.tokenizer.encode(text)
    with torch.no_grad():
        expected = tiny_lm.model(torch.tensor([[*ids, *ROW[0].tolist()]]))[:, len(ids) :]
        add_prompt(tiny_lm, Settings(data="none", text=text))
        torch.testing.assert_close(tiny_lm.model(ROW), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["text", "vocabulary", "random"])
def test_first_values(tiny_lm, init):
    made = add_prompt(tiny_lm, Settings(data="none", init=init, length=30, text="Hello there", seed=4)).prompt_MD
    vectors = tiny_lm.model.model.embed_tokens.weight
    rows = [next((i for i, row in enumerate(vectors) if torch.equal(row, one)), None) for one in made]
    assert made.shape == (30, 32)
    if init == "random":
        assert rows == [None] * 30 and made.abs().max() <= 0.5 and made.mean().abs() < 0.05 < made.std()
    elif init == "text":
        ids = tiny_lm.tokenizer.encode("Hello there")
        assert rows == [ids[i % len(ids)] for i in range(30)]
    else:
        assert not {0, 1, 2, None} & set(rows) and len(set(rows)) > 20


def test_only_the_prompt_trains(tiny_lm):
    made = add_prompt(tiny_lm, Settings(data="none", length=4))
    assert [name for name, p in tiny_lm.model.named_parameters() if p.requires_grad] == ["model.virtual.prompt_MD"]
    tiny_lm.model(ROW).sum().backward()
    assert made.prompt_MD.grad.abs().min(dim=1).values.max() > 0
    assert all(p.grad is None for name, p in tiny_lm.model.named_parameters() if "virtual" not in name)


@pytest.mark.parametrize("pack", [True, False])
def test_tuning_lowers_the_loss_and_leaves_an_adapter(tiny_lm_directory, given, tmp_path, logits, pack):
    settings = Settings(**{**given, "steps": 8, "learning_rate": 0.1}, length=6, pack=pack)
    prompt(tiny_lm_directory, tmp_path / "tuned", settings)
    rows = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
    assert sum(row["loss"] for row in rows[-3:]) < sum(row["loss"] for row in rows[:3]) - 0.1
    lm = bildung.load(tmp_path / "tuned")
    assert (logits(lm) - logits(bildung.load(tiny_lm_directory))).abs().max() > 0.05
    record = read_record(tmp_path / "tuned")
    assert record.operation == "tune prompt" and record.measured["trainable_parameters"] == 6 * 32
    assert "model.safetensors" not in record.files
    bildung.save(lm, tmp_path / "copy")
    assert torch.equal(logits(bildung.load(tmp_path / "copy")), logits(lm))


def test_packed_is_padded(tiny_lm_directory, given, tmp_path):
    """The same conversations, packed into rows or one a row: the same loss."""
    losses = []
    for pack in (True, False):
        settings = Settings(**{**given, "steps": 1, "batch_size": 6}, pack=pack, length=5)
        prompt(tiny_lm_directory, tmp_path / f"pack {pack}", settings)
        losses.append(json.loads((tmp_path / f"pack {pack}/metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_bad_requests(tiny_lm, tiny_lm_directory, given, tmp_path):
    with pytest.raises(SettingsError, match="takes 1 to 255"):
        add_prompt(tiny_lm, Settings(data="none", length=256))
    with pytest.raises(SettingsError, match="needs a text"):
        add_prompt(tiny_lm, Settings(data="none", text=" "))
    prompt(tiny_lm_directory, tmp_path / "one", Settings(**{**given, "steps": 1}, length=3))
    with pytest.raises(AdapterError, match="virtual tokens already"):
        prompt(tmp_path / "one", tmp_path / "two", Settings(**given))
    with pytest.raises(AdapterError, match="nothing to merge"):
        merge(tmp_path / "one", tmp_path / "merged", MergeSettings(compare_texts=1))
    lora(tiny_lm_directory, tmp_path / "lora", LoraSettings(**{**given, "steps": 1}))
    with pytest.raises(OSError, match="holds one type"):
        prompt(tmp_path / "lora", tmp_path / "three", Settings(**given))
    assert virtual_of(bildung.load(tmp_path / "one").model).length == 3

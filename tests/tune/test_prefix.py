"""Prefix tuning: where it starts, what trains, the MLP that is dropped, what is written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import bildung
from bildung.core.errors import SettingsError
from bildung.core.record import read_record
from bildung.model.virtual import Prefix, virtual_of
from bildung.tune.prefix import Settings, add_prefix, drop_mlp, prefix

ROW = torch.tensor([[5, 60, 7, 101, 33, 250]])
SIZE = 2 * 2 * 2 * 8  # layers, keys and values, key-value heads, head dim


@pytest.mark.parametrize("mlp", [0, 7])
def test_it_starts_as_the_model_that_reads_the_text(tiny_lm, mlp):
    text = "The capital of Italy is"
    ids = tiny_lm.tokenizer.encode(text)
    with torch.no_grad():
        expected = tiny_lm.model(torch.tensor([[*ids, *ROW[0].tolist()]]))[:, len(ids) :]
        add_prefix(tiny_lm, Settings(data="none", text=text, mlp=mlp))
        torch.testing.assert_close(tiny_lm.model(ROW), expected, atol=1e-5, rtol=1e-5)


def test_what_trains(tiny_lm_directory):
    def trained(**settings):
        lm = bildung.load(tiny_lm_directory)
        add_prefix(lm, Settings(data="none", length=4, **settings))
        lm.model(ROW).sum().backward()
        found = {name.removeprefix("model.virtual."): p for name, p in lm.model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.any() for p in found.values())
        return {name: tuple(p.shape) for name, p in found.items()}

    assert trained() == trained(init="random", mlp=0) == {"prefix_MF": (4, SIZE)}
    through = {
        "embedding_MD": (4, 32),
        "down_ED": (512, 32),
        "down_bias_E": (512,),
        "up_FE": (SIZE, 512),
        "up_bias_F": (SIZE,),
    }
    assert trained(init="random") == through


def test_the_mlp_is_dropped_and_nothing_changes(tiny_lm):
    add_prefix(tiny_lm, Settings(data="none", init="random", length=3))
    with torch.no_grad():
        before = tiny_lm.model(ROW)
        drop_mlp(tiny_lm)
        assert torch.equal(tiny_lm.model(ROW), before)
    assert type(virtual_of(tiny_lm.model)) is Prefix
    assert [name for name, _ in tiny_lm.model.named_parameters() if "virtual" in name] == ["model.virtual.prefix_MF"]


@pytest.mark.parametrize("settings", [dict(), dict(mlp=16), dict(init="random", length=6, pack=False)])
def test_tuning_lowers_the_loss_and_leaves_an_adapter(tiny_lm_directory, given, tmp_path, logits, settings):
    settings = {**given, "steps": 8, "learning_rate": 0.05, **settings}
    prefix(tiny_lm_directory, tmp_path / "tuned", Settings(**settings))
    rows = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
    assert sum(row["loss"] for row in rows[-3:]) < sum(row["loss"] for row in rows[:3]) - 0.1
    lm = bildung.load(tmp_path / "tuned")
    (tensor,) = load_file(tmp_path / "tuned/adapter_model.safetensors").values()
    assert tensor.shape == (virtual_of(lm.model).length, SIZE)
    assert (logits(lm) - logits(bildung.load(tiny_lm_directory))).abs().max() > 0.05
    assert read_record(tmp_path / "tuned").operation == "tune prefix"
    answer = bildung.generate(lm, "The capital", new_tokens=5)
    bildung.save(lm, tmp_path / "copy")
    assert bildung.generate(bildung.load(tmp_path / "copy"), "The capital", new_tokens=5) == answer


def test_bad_requests(tiny_lm):
    with pytest.raises(SettingsError, match="takes 1 to 255"):
        add_prefix(tiny_lm, Settings(data="none", init="random", length=300))
    with pytest.raises(SettingsError, match="mlp = -1"):
        add_prefix(tiny_lm, Settings(data="none", mlp=-1))

"""Checkpoints: whole or not at all, only the newest, no pickle."""

from __future__ import annotations

import pytest

from bildung.train import checkpoint
from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import adamw


def names(out):
    return sorted(path.name for path in out.iterdir() if path.name.startswith(".checkpoint"))


def test_only_the_newest_is_kept_and_nothing_is_pickled(make_lora, batch_at, tmp_path):
    model = make_lora()
    fit(model, batch_at, clm, adamw(model, 1e-3), steps=5, out=tmp_path, checkpoint_every=2)
    assert names(tmp_path) == [".checkpoint-00000005"]
    files = sorted(path.name for path in (tmp_path / ".checkpoint-00000005").iterdir())
    assert files == ["state.json", "state.safetensors"]


def test_a_checkpoint_that_could_not_be_finished_is_not_one(make_lora, batch_at, tmp_path, monkeypatch):
    model = make_lora()
    fit(model, batch_at, clm, adamw(model, 1e-3), steps=2, out=tmp_path, checkpoint_every=2)

    def full(path):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "to_disk", full)
    with pytest.raises(OSError, match="disk full"):
        fit(model, batch_at, clm, adamw(model, 1e-3), steps=4, out=tmp_path, checkpoint_every=2)
    assert names(tmp_path) == [".checkpoint-00000002", ".checkpoint-being-written"]
    counters, _ = checkpoint.load(tmp_path, model, adamw(model, 1e-3))
    assert counters["steps"] == 2


def test_frozen_weights_are_not_in_it(make_lora, batch_at, tmp_path):
    model = make_lora()
    fit(model, batch_at, clm, adamw(model, 1e-3), steps=1, out=tmp_path, checkpoint_every=1)
    size = (tmp_path / ".checkpoint-00000001" / "state.safetensors").stat().st_size
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert 3 * trained < size < 3 * trained + 20_000

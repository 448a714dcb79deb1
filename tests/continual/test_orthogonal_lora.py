"""O-LoRA: new directions are orthogonal to all earlier ones; deltas become part of the weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.continual.orthogonal_lora import FILE, OrthogonalLoraSettings
from bildung.continual.train import Settings, train
from bildung.core.errors import SettingsError
from bildung.model.safetensors_file import read_file

NAME = "model.layers.0.self_attn.q_proj"


def overlap(out: Path) -> float:
    """How much of the second task's directions lies along the first's, 0 to 1, over all matrices."""
    both = dict(read_file(out / "2-times" / FILE))
    pairs = [rows.split(4) for rows in both.values()]
    return float(sum((a @ b.t()).square().sum() / (a.norm() ** 2 * b.norm() ** 2) for a, b in pairs) / len(pairs))


@pytest.mark.slow
def test_directions_are_pushed_apart(encoder: Path, given: Callable[..., Settings], tmp_path: Path) -> None:
    found = {}
    for strength in (0.0, 100.0):
        out = tmp_path / f"{strength:g}"
        how = {"rank": 4, "strength": strength}
        train(encoder, out, given(method="orthogonal_lora", orthogonal_lora=how, steps=30, learning_rate=1e-2))
        found[strength] = overlap(out)
    assert found[100.0] < 0.1 * found[0.0]


@pytest.mark.slow
def test_each_directory_is_an_ordinary_model(
    encoder: Path, tasks: Any, given: Callable[..., Settings], tmp_path: Path
) -> None:
    how = {"rank": 4, "target": ["q_proj", "v_proj"]}
    settings = given(tasks=tasks, method="orthogonal_lora", orthogonal_lora=how, steps=40, learning_rate=1e-2)
    measured = train(encoder, tmp_path / "out", settings).measured
    assert measured["scores"][0]["pets"]["score"] > 0.8
    models = [bildung.load(encoder).model, *(bildung.load(tmp_path / "out" / name).model for name in NAMES)]
    weights = [model.get_parameter(f"{NAME}.base.weight").data for model in models]
    for before, after in pairwise(weights):
        assert 0 < int(torch.linalg.matrix_rank(after - before, atol=1e-5)) <= 4
    assert not any(linear.deltas for linear in models[-1].linears().values())
    assert torch.equal(*(model.get_parameter("model.layers.0.mlp.up_proj.base.weight").data for model in models[:2]))
    directions = dict(read_file(tmp_path / "out" / NAMES[2] / FILE))
    assert directions[NAME].shape == (12, 32) and all(".q_proj" in name or ".v_proj" in name for name in directions)


NAMES = ("1-pets", "2-times", "3-colours")


def test_by_default_the_head_has_no_lora_and_the_rate_is_that_of_few_numbers(
    encoder: Path, given: Callable[..., Settings], tmp_path: Path
) -> None:
    """A head of few classes has fewer rows than the rank."""
    record = train(encoder, tmp_path / "out", given(method="orthogonal_lora", steps=1, learning_rate=None))
    assert record.settings["learning_rate"] == 2e-3 and record.settings["orthogonal_lora"]["rank"] == 8
    directions = dict(read_file(tmp_path / "out" / "2-times" / FILE))
    assert directions[NAME].shape == (16, 32) and not any(name.startswith("classifier") for name in directions)


def test_settings_out_of_range() -> None:
    with pytest.raises(SettingsError, match="rank = 0"):
        OrthogonalLoraSettings(rank=0)

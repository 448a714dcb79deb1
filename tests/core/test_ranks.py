"""Which device a process's model goes to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bildung
from bildung.core import ranks
from bildung.core.errors import SettingsError


def test_a_rank_has_the_gpu_of_its_number_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BILDUNG_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranks.device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.device() == torch.device("cuda:1")
    monkeypatch.setenv("BILDUNG_DEVICE", "cuda")
    assert ranks.device() == torch.device("cuda:1")
    monkeypatch.setenv("BILDUNG_DEVICE", "cpu")
    assert ranks.device() == torch.device("cpu")
    monkeypatch.setenv("BILDUNG_DEVICE", "cuda:2")
    with pytest.raises(SettingsError, match=r"cuda:2 is not there.*cpu, cuda:0, cuda:1"):
        ranks.device()


def test_a_model_is_loaded_to_the_device_that_was_asked_for(
    tiny_lm_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bildung.load(tiny_lm_directory, device="meta").model.device.type == "meta"
    monkeypatch.setattr(ranks, "device", lambda: torch.device("meta"))
    assert bildung.load(tiny_lm_directory).model.device.type == "meta"

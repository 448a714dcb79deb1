"""Three small tasks about the same words, whose answers contradict one another, and a tiny encoder to learn them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bildung
from bildung.continual.train import Settings
from bildung.core.settings import resolve
from tests.model.tiny_encoder import tiny_encoder

WORDS = "the sat ran on mat big small red saw a".split()
PAIRS = {"pets": ("cat", "dog"), "times": ("night", "day"), "colours": ("red", "big")}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """The tiny encoder's directory."""
    return bildung.save(tiny_encoder("BertModel", initializer_range=0.2), tmp_path / "encoder")


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[str, ...]:
    """NAME=FILE of three tasks: which of two words a text holds."""
    made = []
    for name, (one, other) in PAIRS.items():
        draw = random.Random(name)
        rows = []
        for number in range(90):
            word = one if number % 3 else other
            rest = draw.choices([w for w in WORDS if w not in (one, other)], k=5)
            rows.append({"text": " ".join([*rest[:2], word, *rest[2:]]), "label": word})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        made.append(f"{name}={path}")
    return tuple(made)


@pytest.fixture
def given(tasks: tuple[str, ...]) -> Callable[..., Settings]:
    """given(method=..., ...) -> settings of a small sequence."""

    def make(**other: Any) -> Settings:
        common = {"tasks": tasks[:2], "held_out": 30, "steps": 40, "learning_rate": 3e-3, "precision": "fp32"}
        return resolve(Settings, {**common, "max_length": 16, "seed": 1, **other})

    return make

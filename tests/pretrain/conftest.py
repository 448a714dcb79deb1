"""A tokenizer to begin with, and a text to learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bildung


@pytest.fixture
def tokenizer_directory(tiny_lm: bildung.LanguageModel, tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    tiny_lm.tokenizer.save(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"the cat number {i % 7} sat on the mat and saw {i % 5} dogs"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)

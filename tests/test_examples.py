"""Every example runs, on a tiny model, and prints something."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[0-9]*.py"))
WITHOUT_SOURCE = {"09_born_from_nothing.py"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(
    example: Path,
    tiny_lm_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = [] if example.name in WITHOUT_SOURCE else [str(tiny_lm_directory)]
    monkeypatch.setattr(sys, "argv", [str(example), *source, str(tmp_path / "out")])
    runpy.run_path(str(example), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_examples_are_short_and_say_how_to_run_them() -> None:
    assert len(EXAMPLES) >= 9
    for example in EXAMPLES:
        text = example.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80 and f"python examples/{example.name}" in text

"""What the README shows is there: its verbs and flags, its Python, its files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bildung.core.verbs import verbs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
LINES = sorted({line.split("#")[0].strip() for line in re.findall(r"^ {4}(bildung .*)$", README + TOUR, re.M)})


@pytest.mark.parametrize("line", LINES)
def test_shown_verbs_and_flags_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    known = verbs()
    index = known.get(f"{words[0]} index")  # `bildung look MODEL` is `bildung look index MODEL`
    verb = next((verb for name, verb in known.items() if words[: len(name.split())] == name.split()), index)
    assert verb is not None
    module = verb.load()
    kinds = [getattr(module, name) for name in ("Settings", "Command") if hasattr(module, name)]
    fields = {field for kind in kinds for field in kind.__dataclass_fields__}
    for flag in (word for word in words if word.startswith("--")):
        assert flag.removeprefix("--").replace("-", "_") in fields, flag


def test_shown_python_runs(tiny_lm_directory: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("lives/smollm2/base", str(tiny_lm_directory))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "copy/config.json").exists() and (tmp_path / "tuned/record.json").exists()


@pytest.mark.parametrize("path", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))])
def test_links_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / path).parent / target).exists(), target


def test_files_of_the_paper_index_exist() -> None:
    index = (ROOT / "docs/paper_index.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:model|tune|align|compress|look|run|train)/[\w/]+\.py)`", index))
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / "bildung" / name).exists()]

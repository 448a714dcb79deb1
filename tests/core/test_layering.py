"""Imports go one way, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import bildung

ORDER = [
    {"core"},
    {"tokens"},
    {"model"},
    {"data"},
    {"tokenizer"},
    {"run"},
    {"train"},
    {"evaluate"},
    {"compress"},
    {"look"},
    {"pretrain"},
    {"tune"},
    {"continual", "align", "edit", "instruct"},
    {"app"},
]
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}
ROOT = Path(bildung.__file__).parent


def imported_folders(source: str, package: str) -> list[tuple[int, str]]:
    """(line, folder of bildung) of every import anywhere in a file, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, node.module or ""]).rstrip(".")
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == "bildung" else [base]
        else:
            continue
        parts = [module.split(".") for module in modules]
        found += [(node.lineno, part[1]) for part in parts if part[0] == "bildung" and len(part) > 1]
    return found


def upward(folder: str, source: str) -> list[tuple[int, str]]:
    """The imports of a file in `folder` that go up, or sideways to another folder of the same rank."""
    return [
        (line, other)
        for line, other in imported_folders(source, f"bildung.{folder}")
        if other in RANK and other != folder and RANK[other] >= RANK[folder]
    ]


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports bildung.{other}"
        for folder in RANK
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, other in upward(folder, path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_has_a_rank():
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")}
    assert folders <= set(RANK)


def test_the_reader_of_imports_sees_every_form():
    forms = [
        "import bildung.app.cli",
        "from bildung.app import cli",
        "from bildung import app",
        "from ..app import cli",
    ]
    for form in forms:
        assert upward("core", f"def f():\n    {form}\n") == [(2, "app")], form
    assert upward("align", "from bildung.edit import rome") == [(1, "edit")]
    assert upward("app", "from bildung.core import errors") == []


def test_core_and_the_command_line_start_without_torch():
    modules = [f"bildung.core.{path.stem}" for path in (ROOT / "core").glob("*.py")]
    modules += ["bildung", "bildung.app.cli", "bildung.data.sources"]
    modules += [f"bildung.app.{name}" for name in ("live", "memory", "log", "cards", "compare", "sites")]
    script = (
        f"import sys\nfor name in {modules!r}: __import__(name)\nassert not {{'torch', 'datasets'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

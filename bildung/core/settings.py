"""Settings: one frozen dataclass per operation serves the command line, the recipe file and Python.

    @settings
    class Settings:
        "Low-rank adaptation."
        rank: int = 8                # rank of the update            <- becomes the help of --rank
        data: str                    # no default: must be given

The class is an ordinary (pydantic) dataclass, so `Settings(rank=16, data="nursery:alpaca")` works in Python, tyro turns
its fields into flags, and `resolve` builds it from a recipe's mapping. All three raise the same SettingsError.

Values are checked in pydantic's lax mode on purpose: YAML 1.1 reads `1e-4` as text, lax mode makes it the float it is.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bildung.core.errors import SettingsError, nearest

S = TypeVar("S")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[S]) -> type[S]:
    """Class decorator: a frozen, keyword-only, type-checked dataclass that refuses unknown keys."""
    made: Any = dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", validate_default=True))
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, **given: Any) -> None:
        try:
            check(self, **given)
        except ValidationError as error:
            raise SettingsError(explain(error, made)) from None

    made.__init__ = init
    return made


def resolve(cls: type[S], given: Mapping[str, Any]) -> S:
    """Settings of class `cls` from a mapping (a recipe's `with`, a record's `settings`), nested ones too.

    Raises SettingsError, one line for each key that is unknown, missing or has a value that does not fit.
    """
    if not isinstance(given, Mapping):
        raise SettingsError(f"settings must be a mapping of names to values, got {type(given).__name__}: {given!r}")
    if unnamed := [key for key in given if not isinstance(key, str)]:
        raise SettingsError(
            f"a setting's name must be text, got {unnamed[0]!r} (YAML reads a bare yes, no, on, off as true or false)"
        )
    return cls(**given)


def as_dict(settings: Any) -> dict[str, Any]:
    """All settings, defaults included, as JSON types: nested settings become dictionaries, paths text, tuples lists."""
    return TypeAdapter(type(settings)).dump_python(settings, mode="json")


def field_names(cls: type) -> list[str]:
    """The names of the settings of `cls`, in the order they are written in the source."""
    return [field.name for field in dataclasses.fields(cls)]


def explain(error: ValidationError, cls: type) -> str:
    """A pydantic error in our words: one line per wrong key, with the nearest allowed name."""
    lines = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            allowed = field_names(_owner(cls, problem["loc"]))
            hint = nearest(str(problem["loc"][-1]), allowed) or "allowed: " + (", ".join(allowed) or "none")
            lines.append(f"unknown setting {name!r}; {hint}")
        elif problem["type"] in ("missing", "missing_keyword_only_argument"):
            lines.append(f"setting {name!r} is missing and has no default")
        else:
            message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            given = "" if isinstance(problem["input"], Mapping | tuple) or not name else f", got {problem['input']!r}"
            lines.append((f"setting {name!r}: " if name else "") + message[:1].lower() + message[1:] + given)
    return "\n".join(dict.fromkeys(lines))


def _owner(cls: Any, location: tuple[int | str, ...]) -> Any:
    """The settings class that holds the key at `location`: `("card", "itens")` -> the class of the field `card`."""
    for part in location[:-1]:
        annotation = (
            cls.__pydantic_fields__[part].annotation if part in getattr(cls, "__pydantic_fields__", {}) else None
        )
        choices = [annotation, *typing.get_args(annotation)]  # `Card | None` is searched for Card
        cls = next((choice for choice in choices if dataclasses.is_dataclass(choice)), cls)
    return cls

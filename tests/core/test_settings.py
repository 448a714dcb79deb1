"""Settings: one definition for Python, recipe and command line; every mistake named in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from bildung.core.errors import SettingsError
from bildung.core.settings import as_dict, resolve, settings


@settings
class Card:
    items: int = 100


@settings
class Toy:
    data: str
    rank: int = 8
    rate: float = 1e-3
    kind: Literal["a", "b"] = "a"
    place: Path = Path("here")
    targets: tuple[str, ...] = ("q", "v")
    card: Card = Card()
    other: Card | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")


def test_resolved_settings_hold_every_default_as_json_types():
    assert as_dict(resolve(Toy, {"data": "x", "card": {"items": 3}})) == {
        "data": "x",
        "rank": 8,
        "rate": 1e-3,
        "kind": "a",
        "place": "here",
        "targets": ["q", "v"],
        "card": {"items": 3},
        "other": None,
    }


def test_what_as_dict_wrote_resolves_to_the_same_settings():
    toy = Toy(data="x", rank=3, card=Card(items=1), other=Card(items=2))
    assert resolve(Toy, as_dict(toy)) == toy


def test_yaml_1_1_reads_1e_4_as_text_and_it_is_a_number_all_the_same():
    assert resolve(Toy, {"data": "x", "rate": "1e-4"}).rate == 1e-4


@pytest.mark.parametrize(
    "given, lines",
    [
        ({"data": "x", "rnak": 3}, ["unknown setting 'rnak'; did you mean 'rank'"]),
        (
            {"data": "x", "zzzz": 3},
            ["unknown setting 'zzzz'; allowed: data, rank, rate, kind, place, targets, card, other"],
        ),
        ({"data": "x", "card": {"itmes": 3}}, ["unknown setting 'card.itmes'; did you mean 'items'?"]),
        ({"data": "x", "other": {"itmes": 3}}, ["unknown setting 'other.itmes'; did you mean 'items'?"]),
        ({}, ["setting 'data' is missing and has no default"]),
        ({"data": "x", "kind": "c"}, ["setting 'kind': input should be 'a' or 'b', got 'c'"]),
        ({"data": "x", "rank": 0}, ["rank must be at least 1, got 0"]),
        ({"data": 3, "rank": "many"}, ["setting 'data': input", "setting 'rank': input"]),
        ({True: 3}, ["a setting's name must be text, got True"]),
        (["rank"], ["settings must be a mapping"]),
    ],
)
def test_each_mistake_is_one_readable_line(given, lines):
    with pytest.raises(SettingsError) as caught:
        resolve(Toy, given)
    shown = str(caught.value).splitlines()
    assert len(shown) == len(lines)
    assert all(line.startswith(start) for line, start in zip(shown, lines, strict=True))


def test_python_gets_the_same_error_as_the_recipe():
    with pytest.raises(SettingsError, match="did you mean 'rank'"):
        Toy(data="x", rnak=3)


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Toy(data="x").rank = 3

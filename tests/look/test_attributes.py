"""`look attributes`: the files it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bildung.core.errors import SettingsError
from bildung.look import attributes
from bildung.look.patchscopes import attribute_extraction
from bildung.look.patchscopes.facts import Fact


def test_what_cannot_be_is_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match="facts is at least 2"):
        attributes.attributes(tmp_path, tmp_path / "out", attributes.Settings(facts=1))
    with pytest.raises(SettingsError, match=r"capitol.*capital"):
        attributes.attributes(tmp_path, tmp_path / "out", attributes.Settings(relations=("capitol",)))


def test_the_verb_writes_page_picture_and_numbers(
    tiny_lm_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def some(lm: object, relation: object, every: list[Fact], count: int, new: int) -> tuple[list[Fact], int]:
        return every[:count], 9

    monkeypatch.setattr(attribute_extraction, "known_facts", some)
    small = [Fact(f"land <{n}>", f"city{n}") for n in range(8)]
    monkeypatch.setattr(attributes, "facts", lambda relation: (small, 2))
    given = attributes.Settings(relations=("capital", "symbol"), facts=4, step=1, new_tokens=2)
    record = attributes.attributes(tiny_lm_directory, tmp_path / "out", given)
    numbers = json.loads((tmp_path / "out" / "attributes.json").read_text())
    one = numbers["relations"]["symbol"]
    assert len(one["texts"]) == 4 and len(one["texts"][0]) == 4 and set(one["lines"]) == set(attributes.LINES)
    html = (tmp_path / "out" / "attributes.html").read_text()
    assert "class HeatMap" in html  # the shared script is in it
    assert "&lt;3&gt;" in html and "<3>" not in html and "data:image/png" in html
    assert "capital: 2 rows of mini:countries have no object" in record.notes

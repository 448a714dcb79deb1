"""What a birth is told about its model: a mapping, YAML or a file; mistakes in it are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bildung.core.errors import SettingsError
from bildung.core.settings import resolve
from bildung.pretrain.birth import Birth


def keys(given: object) -> object:
    return json.loads(str(resolve(Birth, {"data": "mini:moby", "model": given}).model))


def test_a_mapping_its_yaml_and_a_file_say_the_same(tmp_path: Path) -> None:
    expected = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "task": ["1e5x", 100.0]}
    text = "{model_type: gpt2, layer_norm_epsilon: 1e-5, task: [1e5x, 1e2]}"
    (tmp_path / "model.yaml").write_text(text)
    (tmp_path / "model.json").write_text(json.dumps(expected))
    for given in (expected, text, str(tmp_path / "model.yaml"), str(tmp_path / "model.json")):
        assert keys(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.json", "nowhere.json cannot be read: No such file"),
        ("{model_type: gpt2", "neither YAML nor JSON: while parsing a flow mapping"),
        ("gpt2", "as a mapping; 'gpt2' is none"),
    ],
)
def test_mistakes_are_named(given: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        keys(given)

"""recipes/positions.yaml, shortened: two kinds of position and two norms on the small committed text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import bildung
from bildung.app.live import Command, command

RECIPE = Path(bildung.__file__).parent.parent / "recipes" / "positions.yaml"
KEPT = ("words", "rope", "learned", "alibi", "positions", "batch", "norms")


@pytest.mark.slow
def test_the_comparison_of_positions_and_norms(tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["out"] = str(tmp_path / "life")
    recipe["life"] = [step for step in recipe["life"] if step["as"] in KEPT]
    for step in recipe["life"]:
        given = step["with"]
        if step["do"] == "tokenizer train":
            step["from"], given["vocab_size"] = "mini:moby", 400
        elif step["do"] == "pretrain causal":
            given |= dict(data="mini:moby", limit=8, held_out=1, steps=6, batch_size=4, max_length=16)
            given["model"] = {**given["model"], "max_position_embeddings": 16, "num_hidden_layers": 1}
        else:
            given |= dict(data="mini:moby", skip=8, length=64, rows=2, bins=4)
            given["others"] = [name for name in given["others"] if name[1:] in KEPT]
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command(Command(recipe=short))
    positions, norms = (
        json.loads((tmp_path / "life" / name / "by_position.json").read_text()) for name in ("positions", "norms")
    )
    assert [(one["positions"], len(one["loss"])) for one in positions["models"]] == [
        ("rope", 4),
        ("alibi", 4),
        ("learned", 1),
    ]
    assert [one["norm"] for one in norms["models"]] == ["rms", "batch"]
    assert positions["trained"] == 16 and (tmp_path / "life/norms/by_position.png").exists()

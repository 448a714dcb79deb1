"""recipes/regularisation.yaml, shortened: every remedy runs, and the picture has a panel for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import bildung
from bildung.app.live import Command, command
from bildung.core.record import read_record

RECIPE = Path(bildung.__file__).parent.parent / "recipes" / "regularisation.yaml"


@pytest.mark.slow
def test_every_remedy_and_the_picture(tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["out"] = str(tmp_path / "life")
    runs = [step for step in recipe["life"] if step["do"] == "pretrain causal"]
    for step in runs:
        given = {**step["with"], "steps": 6, "evaluate_every": 2, "max_length": 32, "baseline_order": 0, "limit": 4}
        given |= {"held_out": 1, "batch_size": 4, "model": {**given["model"], "n_layer": 1, "n_embd": 32}}
        if "augment" in given:  # WordNet is fetched, not committed
            given["augment"] = {**given["augment"], "synonyms": 0.0}
        step["with"] = given
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command(Command(recipe=short))
    found = json.loads((tmp_path / "life/curves/curves.json").read_text())
    assert [one["name"] for one in found] == [step["as"] for step in runs] and len(found) == 10
    assert (tmp_path / "life/curves/curves.png").exists()
    # What is not "none" was trained with something that "none" was not, and it made a difference.
    losses = {step["as"]: read_record(tmp_path / "life" / step["as"]).measured["loss_last"] for step in runs}  # type: ignore[union-attr]
    assert losses.pop("early-stopping") == losses["none"]  # it has nothing to stop in six steps
    assert len(set(losses.values())) == len(losses)

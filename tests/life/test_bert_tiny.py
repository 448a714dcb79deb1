"""recipes/bert_tiny.yaml, shortened: the same steps on the small committed texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import bildung
from bildung.app.live import Command, command
from bildung.core.record import read_record

RECIPE = Path(bildung.__file__).parent.parent / "recipes" / "bert_tiny.yaml"
SHORTER = {
    "words": {"vocab_size": 600},
    "base": {"data": "mini:moby", "document_rows": 1, "steps": 20, "batch_size": 16, "held_out": 2, "copies": 1},
    "sentiment": {"data": "mini:sentiment", "test": "mini:sentiment", "steps": 15, "batch_size": 8, "max_length": 32},
}


def test_the_life_of_bert_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["out"] = str(tmp_path / "life")
    recipe["life"][0]["from"] = "mini:moby"
    for step in recipe["life"]:
        step["with"] |= SHORTER[step["as"]]
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command(Command(recipe=short))
    said = capsys.readouterr().out
    assert "masked tokens: accuracy" in said and "second segments: accuracy" in said and "texts: accuracy" in said
    base, sentiment = (read_record(tmp_path / "life" / name) for name in ("base", "sentiment"))
    assert base is not None and sentiment is not None
    first, last = base.measured["loss_first"], base.measured["loss_last"]
    assert last < first - 0.5, "the sum of both losses falls"
    assert sentiment.measured["accuracy"] >= sentiment.measured["majority_accuracy"]
    assert [ancestor["operation"] for ancestor in sentiment.ancestors] == ["tokenizer train", "pretrain masked"]
    lm = bildung.load(tmp_path / "life" / "sentiment")
    assert lm.config.heads == ("pooler", "classify") and lm.config.num_labels == 2
    command(Command(recipe=short))
    assert "is up to date" in capsys.readouterr().out

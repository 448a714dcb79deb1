"""recipes/rnn_g2p.yaml and recipes/language_models.yaml, shortened: the same steps on little text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

import bildung
from bildung.app.live import Command, command
from bildung.core.record import read_record

RECIPES = Path(bildung.__file__).parent.parent / "recipes"
PHONEMES = "AE B K D EH F G HH IH JH K L M N AA P K R S T AH V W Z Y Z".split()
SOUNDS = dict(zip("abcdefghijklmnopqrstuvwxyz", PHONEMES, strict=True))


def shortened(name: str, tmp_path: Path, changes: dict[str, dict[str, Any]], data: str) -> Path:
    """The recipe with other settings for its steps (by verb or by name) and every nursery source replaced by `data`."""
    text = (RECIPES / name).read_text(encoding="utf-8").replace("nursery:g2p/train", data)
    recipe = yaml.safe_load(text.replace("nursery:g2p/test", data).replace("nursery:brown", data))
    recipe["out"] = str(tmp_path / "life")
    for step in recipe["life"]:
        step["with"] = {**step["with"], **changes.get(step["do"], {}), **changes.get(step["as"], {})}
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return short


def measured(life: Path, name: str) -> dict[str, Any]:
    record = read_record(life / name)
    assert record is not None
    return record.measured


@pytest.mark.slow
def test_letters_to_phonemes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    names = ["".join(draw.choice("abcdefghiklmnoprstu") for _ in range(draw.randint(3, 9))) for _ in range(300)]
    names += ["thoughtful", "knight", "photography", "mississippi"]
    rows = [{"source": " ".join(one), "target": " ".join(SOUNDS[letter] for letter in one)} for one in names]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"pretrain seq2seq": {"steps": 60, "batch_size": 32, "held_out": 20, "answers": 20, "evaluate_every": 20}}
    command(Command(recipe=shortened("rnn_g2p.yaml", tmp_path, changes, str(tmp_path / "words.jsonl"))))
    life = tmp_path / "life"
    for name in ("none", "bahdanau", "luong"):
        assert measured(life, name)["loss_last"] < measured(life, name)["loss_first"]
        assert (life / name / "model.safetensors").exists()
    said = capsys.readouterr().out
    assert "| none |" in said and "| luong |" in said and "phoneme error" in said
    assert (life / "table/curves.png").exists() and (life / "alignment-luong/alignment.png").exists()
    assert len(json.loads((life / "alignment-bahdanau/alignment.json").read_text())) == 4


@pytest.mark.slow
def test_language_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    little = {"steps": 6, "max_length": 32, "batch_size": 4, "held_out": 4, "evaluate_every": 3, "baseline_order": 0}
    changes = {
        "tokenizer train": {"vocab_size": 400},
        "pretrain causal": little,
        "pretrain bptt": {**little, "window": 32},
        "shrinking": {"steps": 1, "held_out": 0, "evaluate_every": 0},
        "stretching": {"steps": 1, "held_out": 0, "evaluate_every": 0},
        "look gradient_distance": {"rows": 2, "length": 40},
    }
    command(Command(recipe=shortened("language_models.yaml", tmp_path, changes, "mini:moby")))
    life = tmp_path / "life"
    rows = json.loads((life / "table/table.json").read_text())
    assert list(rows) == ["rnn", "lstm", "gru", "transformer", "lstm-bptt"]
    # What the recipe is about: equally many parameters (with its own vocabulary of 2000, too).
    counts = [row["trainable_parameters"] for row in rows.values()]
    assert max(counts) < 1.01 * min(counts)
    assert all(row["held_out_bits_per_byte"] > 0 for row in rows.values())
    assert rows["transformer"]["memory_of_1000_tokens"] > 100 * rows["lstm"]["memory_of_1000_tokens"]
    rates = measured(life, "gradients")
    assert abs(rates["shrinking: rate"] - 0.9) < 0.01 and abs(rates["stretching: rate"] - 1.1) < 0.01
    assert "| lstm-bptt |" in capsys.readouterr().out

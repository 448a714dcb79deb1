"""recipes/transformer_g2p.yaml and translate_en_es.yaml, shortened: the same steps on made-up words and verses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import bildung
from bildung.app.live import Command, command
from bildung.core.record import read_record

RECIPES = Path(bildung.__file__).parent.parent / "recipes"
SMALL = {"hidden_size": 64, "intermediate_size": 64, "dropout": 0.0, "encoder_layers": 1, "decoder_layers": 1}
WORDS = [a + b + c for a in "bdfg" for b in "aeiou" for c in ("t", "n", "ck", "sh")]


def shortened(name: str, life: dict[str, dict[str, Any]], tmp_path: Path, **sources: str) -> Path:
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    recipe["out"] = str(tmp_path / "life")
    recipe["life"][1]["with"]["model"] |= SMALL
    recipe["life"][0]["from"] = sources["tokens"]
    for step in recipe["life"]:
        step["with"] |= life[step["as"]]
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return short


def rows(path: Path, made: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, made)))
    return str(path)


def test_letters_to_phonemes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sounds = {"a": "AE", "e": "EH", "i": "IH", "o": "AA", "u": "AH", "c": "K", "k": "", "s": "SH", "h": ""}
    pairs = [
        {"source": " ".join(word), "target": " ".join(filter(None, (sounds.get(one, one.upper()) for one in word)))}
        for word in WORDS
    ]
    data, test = rows(tmp_path / "train.jsonl", pairs[::2] + pairs[1::4]), rows(tmp_path / "test.jsonl", pairs[3::4])
    model = {
        "data": data,
        "test": test,
        "steps": 160,
        "batch_tokens": 150,
        "learning_rate": 4e-3,
        "held_out": 5,
        "evaluate_every": 50,
    }
    short = shortened("transformer_g2p", {"words": {}, "model": model}, tmp_path, tokens=data)
    command(Command(recipe=short))
    record = read_record(tmp_path / "life" / "model")
    assert record is not None
    assert record.measured["per"] < 0.5 * record.measured["per_most_frequent"] < 1
    assert "exact_match" in record.measured and "copy source" in capsys.readouterr().err
    assert [ancestor["operation"] for ancestor in record.ancestors] == ["tokenizer train"]
    lm = bildung.load(tmp_path / "life" / "model")
    assert lm.config.model_type == "transformer" and lm.config.pad_token_id is not None
    command(Command(recipe=short))
    assert read_record(tmp_path / "life" / "model") == record, "a second run finds it up to date"


def test_verses(tmp_path: Path) -> None:
    english = [{"text": f"the {word} and the {other}", "verse": word} for word, other in pairwise(WORDS)]
    spanish = [{"text": f"el {word}o y el {other}o", "verse": word} for word, other in pairwise(WORDS)]
    data = rows(tmp_path / "en.jsonl", english)
    target = rows(tmp_path / "es.jsonl", spanish)
    model = {
        "data": data,
        "target_data": target,
        "epochs": 2,
        "batch_tokens": 512,
        "held_out": 10,
        "evaluate_every": 0,
        "precision": "fp32",
    }
    words = {"vocab_size": 120, "also": [target]}
    command(Command(recipe=shortened("translate_en_es", {"words": words, "model": model}, tmp_path, tokens=data)))
    record = read_record(tmp_path / "life" / "model")
    assert record is not None
    assert {"bleu", "bleu_copy_source", "chrf", "chrf_copy_source"} <= set(record.measured)
    assert "nrefs:1" in record.measured["signatures"]["bleu"]

"""A decoder that reads beginnings in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bildung
from bildung.core.errors import DataError
from bildung.pretrain.prefix import Settings, prefix

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def tokenizer_directory(tiny_lm: bildung.LanguageModel, tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    tiny_lm.tokenizer.save(directory)
    return directory


@pytest.mark.parametrize("rows", ["prose", "pairs"])
def test_it_learns_to_use_what_it_sees_whole(tokenizer_directory: Path, tmp_path: Path, rows: str) -> None:
    path = tmp_path / "data.jsonl"
    made = [
        {"text": f"the number {i % 7} and the number {i % 5} add up"}
        if rows == "prose"
        else {"source": f"{i % 7} {i % 5}", "target": f"number {i % 7} then {i % 5}"}
        for i in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    given = dict(data=str(path), rows=rows, model=MODEL, steps=60, max_length=64, batch_size=4, held_out=6)
    record = prefix(tokenizer_directory, tmp_path / "out", Settings(**given, precision="fp32", learning_rate=1e-2))
    measured = record.measured
    whole, blind = (measured[f"held_out_nats_per_token{name}"] for name in ("", "_read_left_to_right"))
    assert whole < measured["loss_first"] / 2
    assert blind != whole  # the two ways of reading are not the same
    assert bildung.load(tmp_path / "out").config.model_type == "llama"


def test_only_decoders(tokenizer_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "b a"}')
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 40, "max_position_embeddings": 64}
    with pytest.raises(DataError, match="kind 'encoder'"):
        prefix(tokenizer_directory, tmp_path / "out", Settings(data=str(path), model=bert, held_out=0))

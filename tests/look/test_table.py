"""The table of models: figures of their records, learning curves, baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bildung
from bildung.core.errors import RecordError
from bildung.look.table import Settings, table
from bildung.pretrain.causal import Settings as Birth
from bildung.pretrain.causal import causal

TRANSFORMER = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TRANSFORMER |= {"num_attention_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}


def test_models_side_by_side(
    tiny_lm: bildung.LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words").mkdir()
    tiny_lm.tokenizer.save(tmp_path / "words")
    rows = [{"text": f"the cat number {i % 7} sat on the mat and saw {i % 5} dogs"} for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, model in (("gru", {"model_type": "rnn", "hidden_size": 16}), ("transformer", TRANSFORMER)):
        given = {"data": str(tmp_path / "text.jsonl"), "model": model, "steps": 6, "max_length": 64, "batch_size": 4}
        given |= {"held_out": 6, "precision": "fp32", "evaluate_every": 2}
        causal(tmp_path / "words", tmp_path / name, Birth(**given))  # type: ignore[arg-type]
    settings = Settings(models=(tmp_path / "transformer",), figures=("held_out_tokens",))
    table(tmp_path / "gru", tmp_path / "out", settings)
    found = json.loads((tmp_path / "out/table.json").read_text())
    assert list(found) == ["gru", "transformer"]
    # 16 numbers of state, against keys and values of 1000 tokens, in float32.
    assert found["gru"]["memory_of_1000_tokens"] == 16 * 4 / 1000
    assert found["transformer"]["memory_of_1000_tokens"] == 1000 * 2 * 16 * 4 / 1000
    text = (tmp_path / "out/table.md").read_text()
    assert text.startswith("| model | parameters | tokens read | bits per byte |") and "| held_out_tokens |" in text
    assert f"| gru | {found['gru']['trainable_parameters']:,} |" in text
    assert "Baselines: unigram bits per byte" in text and text in capsys.readouterr().out
    assert (tmp_path / "out/curves.png").stat().st_size > 10_000
    with pytest.raises(RecordError, match="holds no record"):
        table(tmp_path / "gru", tmp_path / "more", Settings(models=(tmp_path / "words",)))

"""A decoder that reads beginnings in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import bildung
from bildung.core.errors import DataError, SettingsError
from bildung.data.batches import pack
from bildung.data.prefix_lm import pad_prefix
from bildung.data.seq2seq import pairs
from bildung.data.text import documents
from bildung.evaluate.likelihood import score
from bildung.pretrain.birth import set_aside
from bildung.pretrain.prefix import Settings, _examples, prefix
from bildung.run.generate import encode_prompt
from bildung.run.write import write
from bildung.train.objectives import clm
from bildung.train.prefix_lm import prefix_lm

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


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
    assert any("written as model_type 'bildung'" in note for note in record.notes)

    # From its directory it scores as it was measured here, and answers as it reads there.
    lm = bildung.load(tmp_path / "out")
    kept, aside = set_aside([*(documents if rows == "prose" else pairs)(str(path))], 6, 0)
    examples = _examples(lm, aside, Settings(**given))
    batch = pad_prefix([[one] for one in examples], lm.tokenizer.pad_id, packed=False)
    with torch.no_grad():
        learned, again = prefix_lm(lm.model, batch), clm(lm.model, batch.batch)
    assert learned.count == again.count == sum(one.num_targets for one in examples)
    assert float(again.total) == pytest.approx(float(learned.total), rel=1e-6)
    assert float(learned.total) / learned.count == pytest.approx(whole, rel=1e-5)
    scores = score(lm.model, examples)
    assert -sum(one.logprob for one in scores) == pytest.approx(float(learned.total), rel=1e-5)
    packed = pad_prefix(pack(examples, 64), lm.tokenizer.pad_id, packed=True)
    with torch.no_grad():
        assert float(clm(lm.model, packed.batch).total) == pytest.approx(float(learned.total), rel=1e-5)
    if rows == "pairs":
        asked = kept[0]
        read = lm.tokenizer.encode(asked.source), encode_prompt(lm, asked.source)
        assert read[1] == [*read[0], lm.tokenizer.eos_id]  # as in training: a source is closed
        answer = bildung.generate(lm, asked.source, new_tokens=24)
        assert answer == write(lm.model, lm.tokenizer, [read[1]], 24)[0][0].text
        with pytest.raises(SettingsError, match="leads no conversation"):
            bildung.generate(lm, asked.source, chat=True)


def test_peers_refuse_its_directory(tokenizer_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the number {i}"}) for i in range(8)))
    given = dict(data=str(path), steps=1, max_length=32, batch_size=2, held_out=0, precision="fp32")
    prefix(tokenizer_directory, tmp_path / "out", Settings(**given, model=MODEL))
    with pytest.raises(ValueError, match="model type `bildung`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # It goes on learning, and is tuned, as what it is.
    record = prefix(tmp_path / "out", tmp_path / "more", Settings(**given))
    assert not any("written as" in note for note in record.notes)
    assert bildung.load(tmp_path / "more").config == bildung.load(tmp_path / "out").config


def test_rows_longer_than_the_context(tokenizer_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "b a"}')
    given = Settings(data=str(path), model=MODEL, held_out=0, max_length=65)
    with pytest.raises(SettingsError, match="max_length = 65, and the model's context has 64 tokens"):
        prefix(tokenizer_directory, tmp_path / "out", given)


def test_only_decoders(tokenizer_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "b a"}')
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 40, "max_position_embeddings": 64}
    with pytest.raises(DataError, match="kind 'encoder'"):
        prefix(tokenizer_directory, tmp_path / "out", Settings(data=str(path), model=bert, held_out=0))

"""`tokenizer train`: a directory with a record, made once, from any text; on the command line and in a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from bildung.app.cli import run
from bildung.core.errors import DataError, OutputError, SettingsError
from bildung.core.record import read_record
from bildung.tokenizer.train import Settings, train
from bildung.tokens.tokenizer import Tokenizer


def test_makes_a_directory_with_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "words"
    record = train("mini:moby", out, Settings(vocab_size=500, limit=6))
    assert read_record(out) == record and record.operation == "tokenizer train" and record.source is None
    assert list(record.data) == ["mini:moby/moby.jsonl"] and record.settings["algorithm"] == "byte_bpe"
    held = record.measured["held_out"]
    assert record.measured["vocabulary"] == 500 and held["tokens"] > held["words"] > 0 == held["unknown_rate"]
    assert held["bytes_per_token"] == pytest.approx(held["bytes"] / held["tokens"], abs=1e-6)
    tokenizer, peer = Tokenizer.load(out), transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("the whale") == peer.encode("the whale")
    assert "500 tokens. On" in capsys.readouterr().out
    before = (out / "tokenizer.json").stat().st_mtime_ns
    assert train("mini:moby", out, Settings(vocab_size=500, limit=6)) == record
    assert (out / "tokenizer.json").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match=r"settings\.vocab_size 500 -> 400"):
        train("mini:moby", out, Settings(vocab_size=400, limit=6))


def test_what_is_small_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a rose is a rose is a rose")
    record = train(tmp_path / "text.txt", tmp_path / "out", Settings(vocab_size=1000))
    assert any("the text has no more to merge" in note and "and not 1000" in note for note in record.notes)
    assert any("measured on the training text" in note for note in record.notes)
    assert record.measured["training_text"]["words"] == 8


def test_several_sources_and_columns(tmp_path: Path) -> None:
    rows = [{"word": "cat", "phonemes": "K AE1 T"}, {"word": "act", "phonemes": "AE1 K T"}]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "two.jsonl").write_text(json.dumps({"phonemes": "B AE1 T"}) + "\n")
    settings = Settings(algorithm="word", columns=("phonemes",), also=(str(tmp_path / "two.jsonl"),))
    record = train(tmp_path / "one.jsonl", tmp_path / "out", settings)
    assert set(Tokenizer.load(tmp_path / "out").backend.get_vocab()) == {
        *("K", "AE1", "T", "B"),
        *("<s>", "</s>", "<unk>", "<pad>"),
    }
    assert len(record.data) == 2


def test_bad_sources_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    out = tmp_path / "out"
    for settings in (Settings(), Settings(algorithm="byte")):
        with pytest.raises(DataError, match="no usable row"):
            train(tmp_path / "empty.txt", out, settings)
    with pytest.raises(DataError, match="no data called 'nurserry:imdb'"):
        train("nurserry:imdb", out, Settings())
    with pytest.raises(SettingsError, match="below the alphabet"):
        train("mini:moby", out, Settings(algorithm="bpe", vocab_size=20, limit=2))
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--algorithm", "wordpiece", "--vocab-size", "300", "--limit", "3", "--normalize", "nfkc", "lowercase"]
    more = ["--specials", "unk", "<unk>", "pad", "<pad>", "--control", "<a>", "<b>"]
    run(["tokenizer", "train", "mini:moby", str(out), *flags, *more])
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == 300 and tokenizer.named["unk_token"] == "<unk>"
    assert [tokenizer.id_of(token) for token in ("<pad>", "<a>", "<b>")] == [297, 298, 299]
    assert tokenizer.encode("WHALE") == tokenizer.encode("whale")


def test_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"out: {tmp_path}/lives\nlife:\n"
        "  - as: words\n    do: tokenizer train\n    from: mini:moby\n"
        "    with: {algorithm: unigram, vocab_size: 200, limit: 2, specials: {unk: <unk>, pad: <pad>}}\n"
    )
    run(["live", str(recipe)])
    assert Tokenizer.load(tmp_path / "lives" / "words").vocab_size == 200

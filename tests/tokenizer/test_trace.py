"""`tokenizer trace` prints every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bildung.app.cli import run
from bildung.core.errors import SettingsError, TokenizerError
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import Learning
from bildung.tokenizer.trace import show
from bildung.tokens.trace import Tracer

TEXTS = ["low lower lowest new newer newest wide wider widest"] * 3


def printed(text: str, **given: object) -> str:
    console = Console(record=True, width=200)
    with console.capture() as seen:
        show(console, "name", Tracer(learn(TEXTS, Learning(**given)).tokenizer), text)
    return seen.get()


def test_bpe_shows_the_merges_in_order() -> None:
    seen = printed("lowest", algorithm="bpe", vocab_size=40)
    lines = [line.split() for line in seen.splitlines() if "rank" in line]
    ranks = [int(line[1]) for line in lines]
    assert lines and ranks == sorted(ranks) and "l o w e s t" in seen
    assert all(line[2] + line[4] in line[5:] for line in lines)


def test_wordpiece_shows_every_try_and_the_unknown_word() -> None:
    assert "newestt newest" not in printed("newest", algorithm="wordpiece", vocab_size=60)
    seen = printed("newz", algorithm="wordpiece", vocab_size=60)
    assert "newz new" in seen and "no piece fits: the whole word is [UNK]" in seen
    assert "101 characters are too many" in printed("n" * 101, algorithm="wordpiece", vocab_size=60)


def test_unigram_shows_how_far_the_runner_up_lies_behind() -> None:
    seen = printed("lowest", algorithm="unigram", vocab_size=30)
    assert "best" in seen and "runner-up" in seen and "nats behind" in seen


def test_words_are_in_the_vocabulary_or_not() -> None:
    seen = printed("low lo", algorithm="word")
    assert seen.count("in the vocabulary") == 2 and seen.count("not in the vocabulary") == 1


def test_without_tokenizers_three_are_learned_and_the_pruning_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run(["tokenizer", "trace", "whales", "--limit", "2", "--vocab-size", "300"])
    seen = capsys.readouterr().out
    assert all(f"{name}, 300 tokens from mini:moby" in seen for name in ("bpe", "wordpiece", "unigram"))
    assert "how the Unigram vocabulary was pruned" in seen and "→" in seen


def test_with_tokenizers_these_are_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn(TEXTS, Learning(algorithm="byte")).tokenizer.save(tmp_path / "bytes")
    run(["tokenizer", "trace", "é", str(tmp_path / "bytes")])
    seen = capsys.readouterr().out
    assert "bytes" in seen and "195 169" in seen and "pruned" not in seen
    with pytest.raises(TokenizerError, match="not Unicode"):
        run(["tokenizer", "trace", "\udce9", str(tmp_path / "bytes")])


def test_what_cannot_be_traced(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the text is empty"):
        run(["tokenizer", "trace", " "])
    with pytest.raises(SettingsError, match=rf"the text comes first: bildung tokenizer trace TEXT {tmp_path}"):
        run(["tokenizer", "trace", str(tmp_path), "some words"])

"""What operations without a model keep of what they read: counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bildung.app.planning import reading
from bildung.app.planning.passing import settings_for
from bildung.app.planning.plain import parts
from bildung.core.errors import SettingsError
from bildung.tokens.tokenizer import Tokenizer
from tests.conftest import tiny_tokenizer


def text_in(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_a_sample_is_spread_evenly_and_no_larger_than_twice_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SAMPLE", 50)
    drawn = reading.sample(f"{number:010}" for number in range(64))
    assert drawn.letters == 640 and drawn.texts == [f"{number:010}" for number in range(0, 64, 8)]
    assert drawn.share == 1 / 8


def test_different_words_grow_as_they_did_within_the_sample() -> None:
    """All of the text is there: no growth. A quarter of it, in which twice the text has 1.5 times the words: 1.5²."""
    texts = ["a b", "c b"]
    count, found = reading.Sample(texts, 6).different(str.split)
    assert count == 3 and found == {"a", "b", "c"}
    count, _ = reading.Sample(texts, 24).different(str.split)
    assert count == pytest.approx(3 * 1.5**2)


@pytest.mark.parametrize(
    "algorithm, words", [("bpe", ["abc", "▁abc", "▁de", "▁fg"]), ("wordpiece", ["abc", "de", "fg"]), ("word", [])]
)
def test_a_vocabulary_is_learned_from_pairs_in_different_words(
    algorithm: str, words: list[str], tmp_path: Path
) -> None:
    """The space before a word is part of it in BPE; what stands between spaces is no more than counted."""
    source = text_in(tmp_path / "text.jsonl", "abc de abc", "abc abc fg")
    made = parts("tokenizer train", source, {"algorithm": algorithm, "normalize": []})
    assert made.get("words, and where their pairs stand", 0) == reading.OF_PAIR * sum(len(one) - 1 for one in words)


def test_what_is_not_planned_is_said() -> None:
    for values in ({"algorithm": "unigram"}, {"algorithm": "bpe", "also": ["hub:owner/name"]}):
        with pytest.raises(SettingsError, match="planned"):
            parts("tokenizer train", "mini:moby", values)
    assert parts("pretrain tokenize", "words", {}) == {} == parts("nursery", "", {})


def test_a_part_of_tokens_a_log_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, tokenizer = tmp_path / "words", tiny_tokenizer()
    words.mkdir()
    tokenizer.save(words)
    text = "the whale and the sea " * 20
    source = text_in(tmp_path / "text.jsonl", *[text] * 50)
    count = len(Tokenizer.load(words).encode(text))
    made = parts("pretrain tokenize", str(words), {"data": source})
    assert made["tokens of a part"] == pytest.approx(reading.OF_TOKEN * 50 * count, abs=100)
    monkeypatch.setattr(reading, "PART_TOKENS", 10 * count)  # and the document that is beyond it
    made = parts("pretrain tokenize", str(words), {"data": source})
    assert made["tokens of a part"] == pytest.approx(reading.OF_TOKEN * 11 * count, abs=100)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("x" * 1000)
    (run / "record.json").write_text("{}")
    given: Any = SimpleNamespace(runs=(run,) * 4)
    drawn = reading.drawn_curves(str(run), given)
    assert drawn["logs"] == 5 * 6000 and drawn["the picture"] == reading.READING + round(4 * 11.6 * 5.0 * 150**2)
    assert reading.told(str(run), settings_for("report", {})[0])["records and logs"] == 6 * 1002

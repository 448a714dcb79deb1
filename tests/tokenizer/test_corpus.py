"""Text out of rows, cut into passages, a twentieth held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bildung.core.errors import DataError
from bildung.tokenizer.corpus import LONGEST, Corpus, fingerprints, passages, texts


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_text_columns_and_conversations(tmp_path: Path) -> None:
    assert list(texts(write(tmp_path, [{"text": "a"}, {"text": "b"}]))) == ["a", "b"]
    words = write(tmp_path, [{"word": "cat", "phonemes": "K AE1 T"}])
    assert list(texts(words, ("phonemes",))) == ["K AE1 T"] and list(texts(words, ("word", "phonemes"))) == [
        "cat\nK AE1 T"
    ]
    chat = write(tmp_path, [{"instruction": "say", "input": "", "output": "hi"}])
    assert list(texts(chat)) == ["say\nhi"]


def test_rows_without_text_are_named(tmp_path: Path) -> None:
    words = write(tmp_path, [{"word": "cat", "count": 3}])
    with pytest.raises(DataError, match=r"no `text`; name `columns`, here: word"):
        list(texts(words))
    with pytest.raises(DataError, match="no text in column 'wrod'; columns with text: word"):
        list(texts(words, ("wrod",)))
    corpus = Corpus([write(tmp_path, [{"text": "a"}, {"word": "b"}])])
    assert list(corpus.training) == ["a"]
    assert corpus.notes() and "no `text`" in corpus.notes()[0]


@given(st.lists(st.text(alphabet="ab \n", max_size=3 * 50), max_size=5))
def test_passages_lose_nothing(documents: list[str]) -> None:
    long = [text * 60 for text in documents]
    cut = list(passages(long))
    assert "".join(cut) == "".join(long) and all(0 < len(text) <= LONGEST for text in cut)


def test_passages_end_at_lines_then_before_spaces() -> None:
    line = "x" * 900 + "\n"
    assert [len(text) for text in passages([line * 3])] == [1802, 901]
    first, second = passages(["word " * 401])
    assert first.endswith("word") and second == " word "
    assert [len(text) for text in passages(["x" * 4500])] == [2000, 2000, 500]


def test_every_twentieth_passage_is_held_out(tmp_path: Path) -> None:
    corpus = Corpus([write(tmp_path, [{"text": str(number)} for number in range(1, 46)])])
    assert list(corpus.held_out) == ["20", "40"] and len(list(corpus.training)) == 43
    assert not set(corpus.held_out) & set(corpus.training)
    assert list(Corpus([write(tmp_path, [{"text": "a"}])]).held_out) == []


def test_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    one, two = write(tmp_path, [{"text": "a"}], "1.jsonl"), write(tmp_path, [{"text": "b"}, {"text": "c"}], "2.jsonl")
    assert list(Corpus([one, two]).training) == ["a", "b", "c"]
    assert list(Corpus([one, two], limit=1).training) == ["a", "b"]
    assert set(fingerprints([one, two])) == {one, two}

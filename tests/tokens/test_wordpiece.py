"""Greedy longest match."""

from __future__ import annotations

import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from bildung.tokens import wordpiece

VOCABULARY = {"un", "una", "##aff", "##able", "##f", "a", "##a"}


def test_every_try_is_shown_from_long_to_short() -> None:
    found = wordpiece.matches("unaff", VOCABULARY | {"##ff"})
    assert [match.piece for match in found] == ["una", "##ff"]
    assert found[0].tried == ("unaff", "unaf", "una") and found[1].tried == ("##ff",)
    assert [match.rest for match in found] == ["unaff", "ff"]


def test_greed_never_goes_back_and_one_gap_makes_the_word_unknown() -> None:
    found = wordpiece.matches("unaffable", VOCABULARY)  # un + ##aff + ##able would do, but una is longer
    assert [match.piece for match in found] == ["una", "##f", "##f", "##able"]
    found = wordpiece.matches("unaffables", VOCABULARY)
    assert found[-1].piece is None and found[-1].tried == ("##s",)
    assert wordpiece.pieces(found, "[UNK]") == ["[UNK]"]


def test_a_long_word_is_unknown_unread() -> None:
    found = wordpiece.matches("a" * 101, VOCABULARY)
    assert found[0].tried == () and wordpiece.pieces(found, "[UNK]") == ["[UNK]"]
    assert wordpiece.pieces(wordpiece.matches("a" * 100, VOCABULARY), "[UNK]") == ["a", *["##a"] * 99]


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=8),
    st.text("abcd", min_size=1, max_size=12),
)
def test_equals_the_library_on_any_vocabulary(first: list[str], inside: list[str], word: str) -> None:
    pieces = dict.fromkeys(["[UNK]", *first, *(f"##{piece}" for piece in inside)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    assert wordpiece.pieces(wordpiece.matches(word, vocabulary), "[UNK]") == library.encode(word).tokens

"""Text as it is generated: never a torn character, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bildung.tokens.stream import StreamDecoder
from bildung.tokens.tokenizer import Tokenizer
from tests.tokens.samples import TEXTS, byte_level, sentencepiece

TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = False) -> list[str]:
    stream = StreamDecoder(tokenizer, skip_special=skip_special)
    return [*(stream.push(number) for number in ids), stream.flush()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_are_whole_characters(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    pieces = streamed(tokenizer, tokenizer.encode(text, bos=False))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=30), st.booleans())
def test_any_ids_stream_to_what_they_decode_to(ids: list[int], skip_special: bool) -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert "".join(streamed(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special=skip_special)
    # SentencePiece: the special tokens, one byte and all the words
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [i if i < 4 else i + 255 for i in ids if i + 255 < tokenizer.vocab_size]
    assert "".join(streamed(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special=skip_special)


def test_words_appear_at_once_and_an_emoji_when_it_is_whole() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("hello 🙂")
    pieces = streamed(tokenizer, ids)
    assert pieces[0] and pieces[-1] == "" and pieces[-2] == "🙂" and pieces[-5:-2] == ["", "", ""]


def test_a_skipped_special_token_keeps_the_space_after_it() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    word = tokenizer.id_of("▁hello")
    assert streamed(tokenizer, [word, 2, word], skip_special=True) == ["hello", "", " hello", ""]


def test_an_unfinished_character_is_given_up_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert streamed(tokenizer, tokenizer.encode("🙂")[:-1])[-1] == "\ufffd"

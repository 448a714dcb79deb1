"""Tokens on disk: every token a target once, resumable, verified."""

from __future__ import annotations

from pathlib import Path

import pytest

import bildung
from bildung.core.errors import DataError
from bildung.data.token_files import TokenRows, write_token_files

TEXTS = [f"text number {n}: " + "the cat sat on the mat. " * (n % 4) for n in range(30)]


@pytest.fixture
def tokenizer(tiny_lm: bildung.LanguageModel) -> bildung.LanguageModel:
    return tiny_lm.tokenizer  # type: ignore[return-value]


def stream(tokenizer) -> list[list[int]]:  # type: ignore[no-untyped-def]
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [tokenizer.encode(text) + ends for text in TEXTS]


def test_every_token_but_a_documents_first_is_a_target_once(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_token_files(tmp_path / "t", tokenizer, TEXTS, part_tokens=10**9)
    rows = TokenRows(tmp_path / "t", 16)
    targets = [
        token
        for row in rows
        for piece in row
        for token, is_target in zip(piece.tokens, piece.loss_mask, strict=True)
        if is_target
    ]
    expected = [token for document in stream(tokenizer) for token in document[1:]]
    assert targets == expected[: len(targets)] and 0 <= rows.left_out < 15
    assert all(sum(map(len, row)) == 16 for row in rows)
    assert rows.tokens == sum(map(len, stream(tokenizer)))
    counts = rows.counts(tokenizer.vocab_size)
    assert [counts[token] for token in range(tokenizer.vocab_size)] == [expected.count(t) for t in range(len(counts))]


def test_a_killed_run_goes_on(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    whole = write_token_files(tmp_path / "whole", tokenizer, TEXTS, part_tokens=50)

    def broken():  # type: ignore[no-untyped-def]
        yield from TEXTS[:17]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_files(tmp_path / "again", tokenizer, broken(), part_tokens=50)
    parts = len(list((tmp_path / "again").glob("tokens-*")))
    assert 0 < parts < len(whole["parts"])
    assert write_token_files(tmp_path / "again", tokenizer, TEXTS, part_tokens=50) == whole
    assert list(TokenRows(tmp_path / "again", 9)) == list(TokenRows(tmp_path / "whole", 9))


def test_damage_is_named(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_token_files(tmp_path / "t", tokenizer, TEXTS, part_tokens=50)
    TokenRows(tmp_path / "t", 9).verify()
    file = tmp_path / "t" / "tokens-00001.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="part 1 are damaged"):
        TokenRows(tmp_path / "t", 9).verify()
    file.write_bytes(content[:-40])
    with pytest.raises(DataError, match="part 1"):
        TokenRows(tmp_path / "t", 9)[0]
    with pytest.raises(DataError, match="less than one row"):
        TokenRows(tmp_path / "t", 10**6)
    with pytest.raises(DataError, match="no text"):
        write_token_files(tmp_path / "none", tokenizer, [])

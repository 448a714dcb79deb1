"""Byte-pair merges, one by one."""

from __future__ import annotations

import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from bildung.tokens import bpe

RANKS = {("l", "o"): 0, ("lo", "w"): 1, ("e", "r"): 2, ("low", "er"): 3, ("w", "e"): 4}


def test_merges_apply_by_rank_and_not_by_place() -> None:
    steps = bpe.merge("lower", RANKS)
    assert [(step.rank, step.left, step.right) for step in steps] == [
        (0, "l", "o"),
        (1, "lo", "w"),
        (2, "e", "r"),
        (3, "low", "er"),
    ]
    assert [step.pieces for step in steps][-2:] == [("low", "er"), ("lower",)]
    assert bpe.merge("xyz", RANKS) == []


def test_the_leftmost_of_equal_pairs_comes_first() -> None:
    assert [step.pieces for step in bpe.merge("aaa", {("a", "a"): 0})] == [("aa", "a")]


def test_what_the_vocabulary_lacks_becomes_bytes_or_unknown() -> None:
    vocabulary = {"a", "<unk>", "<0xC3>", "<0xA9>"}
    split = {"unknown": "<unk>", "byte_fallback": True, "fuse_unknown": False}
    assert bpe.symbols("aé", vocabulary, **split) == ["a", "<0xC3>", "<0xA9>"]
    assert bpe.symbols("üü", vocabulary, **split) == ["<unk>", "<unk>"]  # not all of its bytes are there
    assert bpe.symbols("üüa", vocabulary, **{**split, "fuse_unknown": True}) == ["<unk>", "a"]
    assert bpe.symbols("üa", vocabulary, **{**split, "unknown": None}) == ["a"]


@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.text("abc", min_size=1, max_size=3)), max_size=12),
    st.text("abcd", min_size=1, max_size=12),
    st.booleans(),
)
def test_equals_the_library_on_any_list_of_merges(merges: list[tuple[str, str]], word: str, fuse: bool) -> None:
    merges = list(dict.fromkeys(merges))  # also lists no training would leave: joined pieces before their parts
    pieces = dict.fromkeys([*"abc", "<unk>", *(piece for pair in merges for piece in (*pair, "".join(pair)))])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=fuse))
    start = bpe.symbols(word, vocabulary, unknown="<unk>", byte_fallback=False, fuse_unknown=fuse)
    steps = bpe.merge(start, {pair: rank for rank, pair in enumerate(merges)})
    assert list(steps[-1].pieces if steps else start) == library.encode(word).tokens

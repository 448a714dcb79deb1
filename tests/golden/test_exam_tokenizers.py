"""Exam row 20: what each subword algorithm must store, and how it splits.

WordPiece: greedy longest match on the stored vocabulary; no merge rules at inference; a word with an impossible piece
becomes one [UNK]. BPE must store its merges in order. Unigram starts from a large vocabulary and prunes.
"""

from __future__ import annotations

import itertools
import json

import tokenizers
from tokenizers import models

from bildung.data.text import documents
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import Learning
from bildung.tokens.tokenizer import Tokenizer
from bildung.tokens.trace import Tracer

TEXTS = list(documents("mini:moby", limit=3))


def test_wordpiece_is_greedy_and_needs_no_merges() -> None:
    vocabulary = {"[UNK]": 0, "hug": 1, "##gin": 2, "##g": 3, "hugg": 4, "##ing": 5, "h": 6, "##s": 7}
    tracer = Tracer(Tokenizer(tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))))
    (word,) = tracer("hugging")
    assert word.tokens == ("hugg", "##ing")  # the longest first, though "hug" is a piece too
    (word,) = tracer("hugs")
    assert word.tokens == ("hug", "##s")
    (word,) = tracer("hugsx")  # "hug" and "##s" fit, "##x" does not: all of it is lost
    assert word.tokens == ("[UNK]",) and [match.piece for match in word.steps] == ["hug", "##s", None]
    learned = learn(TEXTS, Learning(algorithm="wordpiece", vocab_size=300))
    assert "merges" not in json.loads(learned.tokenizer.backend.to_str())["model"]


def test_bpe_with_the_same_vocabulary_and_other_merge_orders_splits_otherwise() -> None:
    vocabulary = {piece: number for number, piece in enumerate(["a", "b", "c", "ab", "bc"])}
    tokens = []
    for merges in ([("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]):
        (word,) = Tracer(Tokenizer(tokenizers.Tokenizer(models.BPE(vocabulary, merges))))("abc")
        tokens.append(word.tokens)
        assert word.steps[0].rank == 0
    assert tokens == [("ab", "c"), ("a", "bc")]


def test_unigram_starts_large_and_prunes() -> None:
    training = learn(TEXTS, Learning(algorithm="unigram", vocab_size=300)).training
    assert training is not None
    sizes = [one.pieces for one in training.rounds]
    assert sizes[0] > 3000 and all(after < before for before, after in itertools.pairwise(sizes))
    assert len(training.scores) == 300 - 4  # and the special tokens
    assert all(one.removed for one in training.rounds[:-1])

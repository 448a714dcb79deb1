"""Prompts of indirect objects and of agreement: whole words, lined up, and right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from bildung.core.errors import DataError, SettingsError
from bildung.look.causal.pair_tasks import LINKS, NAMES, NOUNS, PLURAL, ROOMS, SINGULAR, STORIES, THINGS, make_rows
from bildung.look.causal.prompt_pairs import encode_pairs, read_pairs
from bildung.look.pairs import Settings, pairs
from bildung.tokens.tokenizer import Tokenizer


def word_tokenizer(without: tuple[str, ...] = ()) -> Tokenizer:
    """One token for every word of the prompts, the space before it included."""
    words = {word for story in STORIES for word in story.replace(",", " ").split() if "{" not in word}
    words |= {*NAMES, *ROOMS, *THINGS, *LINKS, *(word for pair in NOUNS for word in pair), "the"}
    texts = [f"Ġ{word}" for word in sorted(words - set(without))] + [
        verb.replace(" ", "Ġ") for verb in PLURAL + SINGULAR
    ]
    vocabulary = {
        text: number for number, text in enumerate([*texts, "When", "After", "While", "The", ",", "<bos>", "?"])
    }
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<bos>"])
    return Tokenizer(backend, {"bos_token": "<bos>", "unk_token": "?"})


def test_indirect_objects_line_up_and_name_the_right_one():
    tokenizer = word_tokenizer()
    for corruption in ("abc", "swap"):
        rows = make_rows("ioi", tokenizer, 24, seed=1, corruption=corruption)
        used = encode_pairs(rows, tokenizer, "ioi")
        assert len(used.rows) == 24 and not used.dropped and len({row["clean"] for row in rows}) == 24
        orders = Counter()
        for pair in used.rows:
            at = {name: pair.clean[index] for name, index in pair.places.items()}
            there = {name: pair.corrupted[index] for name, index in pair.places.items()}
            assert (at["IO"],) == pair.answers and (at["S1"],) == (at["S2"],) == pair.wrong
            assert pair.places["end"] == len(pair.clean) - 1 and pair.places["S1+1"] == pair.places["S1"] + 1
            if corruption == "swap":
                assert there == at | {"S2": at["IO"]}
            else:  # three other names, so that nobody is named twice
                assert len({there["IO"], there["S1"], there["S2"], at["IO"], at["S1"]}) == 5
            orders[pair.places["IO"] < pair.places["S1"]] += 1
        assert min(orders.values()) > 4  # Mary and John, John and Mary


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answers": " Mary"}, "answers = ' Mary' is no list of texts"),  # not M, a, r, y
        ({"wrong": [" Xerxes"]}, "' Xerxes' is not known to this tokenizer"),  # not the logit of "?"
        ({"wrong": [3]}, r"wrong = \[3\] is no list of texts"),
        ({"corrupted": 7}, "corrupted = 7 is no text"),
        ({"places": {"end": 1.5}}, "the indices of tokens"),
        ({"places": ["end"]}, "the indices of tokens"),
        ({"places": {"end": 99}}, "place end = 99 is outside"),
    ],
)
def test_a_row_of_another_form_is_left_out_and_said(change: dict[str, Any], says: str):
    row = make_rows("ioi", word_tokenizer(), 1)[0]
    with pytest.raises(DataError, match=f"no pair can be used. row 1: .*{says}"):
        encode_pairs([row | change], word_tokenizer(), "mine")
    assert encode_pairs([row | change, row], word_tokenizer(), "mine").dropped[0].startswith("row 1: ")


def test_no_rows_are_no_task_and_no_batch():
    with pytest.raises(SettingsError, match="count = 0"):
        make_rows("ioi", word_tokenizer(), 0)
    used = encode_pairs(make_rows("ioi", word_tokenizer(), 1), word_tokenizer(), "ioi")
    with pytest.raises(SettingsError, match="batch_size = 0"):
        used.batches(0)


def test_agreement_is_with_the_first_noun(tmp_path: Path):
    tokenizer = word_tokenizer(without=("keys", "author"))
    tokenizer.save(tmp_path / "tokenizer")
    pairs(tmp_path / "tokenizer", tmp_path / "out", Settings(task="agreement", count=20))
    read = read_pairs(str(tmp_path / "out/pairs.jsonl"), tokenizer)
    assert len(read.rows) == 20 and not read.dropped
    numbers = Counter()
    plurals = {tokenizer.encode(f" {word}", bos=False)[0] for _, word in NOUNS}
    for pair in read.rows:
        subject, end = pair.places["subject"], pair.places["end"]
        is_plural = pair.clean[subject] in plurals
        wanted = PLURAL if is_plural else SINGULAR
        assert [tokenizer.encode(verb, bos=False)[0] for verb in wanted] == list(pair.answers)
        assert (pair.corrupted[subject] in plurals) != is_plural
        assert pair.clean[subject + 1 :] == pair.corrupted[subject + 1 :]
        text = tokenizer.decode(list(pair.clean))
        assert "author" not in text and "key" not in text  # not whole in both numbers: not used
        numbers[is_plural, pair.clean[end] in plurals] += 1
    assert len(numbers) == 4  # the second noun's number says nothing
    assert read.places() == ["The", "subject", "link", "the", "end"]

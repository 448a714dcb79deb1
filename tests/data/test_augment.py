"""Changed texts: what each change does, and that chance is a function of (seed, epoch, row)."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bildung.core.errors import SettingsError
from bildung.data.augment import (
    Augmentation,
    AugmentedBatches,
    augmented,
    drop,
    jostle,
    replace_synonyms,
    swap,
)
from bildung.data.batches import Shuffled, clm_examples, pack, pad_packed

WORDS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=30)
TEXT = "Call me Ishmael.  Some years ago,\nnever mind how long precisely, I went to the ocean."


@given(WORDS, st.integers(0, 99), st.floats(0, 1))
def test_swaps_keep_the_words_and_drops_keep_the_order(words, seed, rate):
    assert Counter(swap(words, rate, random.Random(seed))) == Counter(words)
    kept = drop(words, rate, random.Random(seed))
    assert all(word is None or word == words[place] for place, word in enumerate(kept))
    assert bool(words) == any(word is not None for word in kept)


@given(WORDS, st.integers(0, 99), st.integers(0, 4))
def test_no_word_is_jostled_further_than_its_reach(words, seed, reach):
    numbers = [str(n) for n in range(len(words))]
    moved = jostle(numbers, reach, random.Random(seed))
    assert sorted(moved) == sorted(numbers)
    assert all(abs(place - int(number)) <= reach for place, number in enumerate(moved))


def test_jostling_and_dropping_happen():
    numbers = [str(n) for n in range(200)]
    assert jostle(numbers, 2, random.Random(0)) != numbers
    assert 20 < drop(numbers, 0.2, random.Random(0)).count(None) < 60


def test_synonyms_keep_case_and_punctuation_and_leave_short_words():
    synonyms = {"ocean": ["sea"], "some": ["certain"], "went": ["travelled"], "me": ["maine"]}
    words = replace_synonyms(["Some", "went", "to", "me", '"ocean."', "oceans"], 1.0, synonyms, random.Random(0))
    assert words == ["Certain", "travelled", "to", "me", '"sea."', "oceans"]


def test_chance_is_a_function_of_seed_epoch_and_row():
    def all_of(seed):
        how = Augmentation(share=1.0, drop=0.2, jostle=2)
        return [augmented(TEXT, how, seed, epoch, row) for epoch in range(3) for row in range(3)]

    assert all_of(1) == all_of(1) and len(set(all_of(1) + all_of(2))) == 18


def test_share_of_the_rows_is_left_whole_and_zeros_change_nothing():
    half = [augmented(TEXT, Augmentation(share=0.5, drop=0.3), 0, 0, row) == TEXT for row in range(400)]
    assert 150 < sum(half) < 250
    assert not Augmentation().is_on and augmented(TEXT, Augmentation(share=1.0), 0, 0, 0) == TEXT


def test_out_of_range_is_refused():
    with pytest.raises(SettingsError, match=r"augment\.drop = 1\.5"):
        Augmentation(drop=1.5)
    with pytest.raises(SettingsError, match="jostle"):
        Augmentation(jostle=-1)


@pytest.mark.parametrize("how", [dict(drop=0.3), dict(jostle=3)])
def test_batches_change_text_and_keep_documents_apart(tiny_lm, how):
    tokenizer = tiny_lm.tokenizer
    examples = clm_examples(tokenizer, ["the cat sat on the mat and saw the dog run", "a dog and a cat sat"] * 4, 64)
    rows = pack(examples, 64)
    plain = Shuffled(rows, 2, 0, lambda chosen: pad_packed(chosen, tokenizer.pad_id, multiple=1))
    changed = AugmentedBatches(plain, tokenizer, Augmentation(share=1.0, **how), seed=0)
    before, after = plain(3), changed(3)
    assert after.tokens_BL.shape[1] <= before.tokens_BL.shape[1]
    assert int(after.segments_BL.max()) == int(before.segments_BL.max())
    assert not after.loss_mask_BL[after.positions_BL == 0].any()
    texts = [tokenizer.decode(batch.tokens_BL[0].tolist()) for batch in (before, after)]
    assert texts[0] != texts[1]
    assert changed(3).tokens_BL.tolist() == after.tokens_BL.tolist() != changed(3 + len(rows)).tokens_BL.tolist()
    off = AugmentedBatches(plain, tokenizer, Augmentation(share=0.0, **how), seed=0)
    assert off(3).tokens_BL.tolist() == before.tokens_BL.tolist()

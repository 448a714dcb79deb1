"""Masking: 80/10/10 counted over 100,000 tokens, how many are chosen, whole words, and the same masks again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bildung.core.errors import DataError, TokenizerError
from bildung.data.masking import (
    DynamicMasks,
    MaskedBatch,
    Masker,
    Sentences,
    continuations,
    mask_generator,
    pad_sentences,
)
from bildung.tokens.tokenizer import Tokenizer
from tests.conftest import tiny_tokenizer
from tests.model.tiny_encoder import wordpiece

CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return wordpiece()


def sentence(tokenizer: Tokenizer, length: int, seed: int) -> Sentences:
    """[CLS], letters and words at random, [SEP]."""
    draw = torch.Generator().manual_seed(seed)
    inner = torch.randint(5, tokenizer.vocab_size, (length - 2,), generator=draw).tolist()
    return Sentences([CLS, *inner, SEP], [0] * length)


def masked(masker: Masker, rows: list[Sentences], seed: int = 0) -> MaskedBatch:
    return masker(pad_sentences([[row] for row in rows], 0), mask_generator(seed, 0))


def counts(batch: MaskedBatch) -> tuple[int, dict[str, float]]:
    chosen, seen, target = batch.chosen_BL, batch.tokens_BL, batch.targets_BL
    total = int(chosen.sum())
    hidden, same = (seen == MASK) & chosen, (seen == target) & chosen
    shares = {"mask": hidden, "same": same, "random": chosen & ~hidden & ~same}
    return total, {name: float(what.sum()) / total for name, what in shares.items()}


@pytest.mark.parametrize("whole_words", [False, True])
def test_80_10_10_over_100_000_tokens(tokenizer: Tokenizer, whole_words: bool) -> None:
    rows = [sentence(tokenizer, 512, seed) for seed in range(1340)]  # 15 % of 512 are 77
    if whole_words:
        rows = rows[:300]
    batch = masked(Masker(tokenizer, whole_words=whole_words), rows)
    total, shares = counts(batch)
    assert total >= (100_000 if not whole_words else 20_000)
    by_chance = 0.1 / (tokenizer.vocab_size - 5)  # a random token that is the same one
    tolerance = 0.01
    assert shares["mask"] == pytest.approx(0.8, abs=tolerance)
    assert shares["random"] == pytest.approx(0.1 - by_chance, abs=tolerance)
    assert shares["same"] == pytest.approx(0.1 + by_chance, abs=tolerance)
    assert torch.equal(batch.tokens_BL[~batch.chosen_BL], batch.targets_BL[~batch.chosen_BL])


def test_how_many_are_chosen(tokenizer: Tokenizer) -> None:
    rows = [sentence(tokenizer, length, length) for length in range(3, 200)]
    batch = masked(Masker(tokenizer), rows)
    expected = [max(1, round(0.15 * len(row))) for row in rows]
    assert batch.chosen_BL.sum(1).tolist() == expected
    assert batch.num_targets == sum(expected) and batch.num_tokens == sum(map(len, rows))


def test_every_place_is_chosen_equally_often_and_special_ones_never(tokenizer: Tokenizer) -> None:
    row = sentence(tokenizer, 22, 1)
    batch = masked(Masker(tokenizer), [row] * 4000 + [Sentences([CLS, 1, SEP], [0] * 3)])
    often = batch.chosen_BL.sum(0)[:22].tolist()
    assert often[0] == often[21] == 0
    assert all(abs(count - 4000 * 3 / 20) < 100 for count in often[1:21])
    assert not batch.chosen_BL[-1].any(), "an unknown token is nothing to predict"
    assert not (batch.chosen_BL & ~batch.keep_BL).any()
    swapped = batch.tokens_BL[batch.chosen_BL & (batch.tokens_BL != MASK)]
    assert int(swapped.min()) >= 5, "no special token is put in"


def words_of(tokenizer: Tokenizer, tokens: Tensor) -> list[list[int]]:
    words: list[list[int]] = []
    for place, token in enumerate(tokens.tolist()):
        if tokenizer.token_of(token).startswith("##") and words:
            words[-1].append(place)
        elif token >= 5:
            words.append([place])
    return words


def test_whole_words_are_hidden_whole(tokenizer: Tokenizer) -> None:
    text = "the xylophones sat on zebras and a cat saw quizzes, kites. the dog ran on the mat"
    ids = tokenizer.encode(text)
    assert any(len(word) > 4 for word in words_of(tokenizer, torch.tensor(ids)))
    row = Sentences([CLS, *ids, SEP], [0] * (len(ids) + 2))
    whole = masked(Masker(tokenizer, whole_words=True), [row] * 300)
    limit = round(0.15 * len(row))
    for targets, chosen in zip(whole.targets_BL, whole.chosen_BL, strict=True):
        picked = [bool(chosen[word].all()) for word in words_of(tokenizer, targets)]
        assert picked == [bool(chosen[word].any()) for word in words_of(tokenizer, targets)]
        assert 1 <= int(chosen.sum()) <= max(limit, 11) and any(picked)
    parts = masked(Masker(tokenizer), [row] * 300)
    assert any(
        chosen[word].any() and not chosen[word].all()
        for targets, chosen in zip(parts.targets_BL, parts.chosen_BL, strict=True)
        for word in words_of(tokenizer, targets)
    )


def test_masks_are_a_function_of_seed_and_number(tokenizer: Tokenizer) -> None:
    rows = [sentence(tokenizer, 30, seed) for seed in range(10)]

    def stream(seed: int) -> DynamicMasks[Sentences]:
        return DynamicMasks(rows, 4, seed, lambda some: pad_sentences([[one] for one in some], 0), Masker(tokenizer))

    one, two, other = stream(0), stream(0), stream(1)
    late = two(7)  # asked for first
    assert torch.equal(one(7).tokens_BL, late.tokens_BL) and torch.equal(one(7).chosen_BL, late.chosen_BL)
    assert not torch.equal(other(7).tokens_BL, late.tokens_BL)
    whole = DynamicMasks(rows[:4], 4, 0, lambda some: pad_sentences([[one] for one in rows[:4]], 0), Masker(tokenizer))
    assert torch.equal(whole(0).targets_BL, whole(1).targets_BL)
    assert not torch.equal(whole(0).chosen_BL, whole(1).chosen_BL), "another epoch, other masks"


def test_packed_rows(tokenizer: Tokenizer) -> None:
    row = [sentence(tokenizer, 9, 1), sentence(tokenizer, 6, 2)]
    batch = pad_sentences([row, [sentence(tokenizer, 11, 3)]], 0)
    assert batch.positions_BL is not None and batch.segments_BL is not None and batch.labels_B is None
    assert batch.positions_BL[0].tolist() == [*range(9), *range(6), 0]
    assert batch.segments_BL[0].tolist() == [1] * 9 + [2] * 6 + [0] and batch.keep_BL[1].sum() == 11
    with pytest.raises(DataError, match="2 labels for 1 rows"):
        pad_sentences([[Sentences([CLS, 7, SEP], [0] * 3, 1)] * 2], 0)


def test_word_marks(tokenizer: Tokenizer) -> None:
    continues = continuations(tokenizer)
    assert bool(continues[tokenizer.id_of("##a")]) and not bool(continues[tokenizer.id_of("cat")])
    byte_level = tiny_tokenizer()
    continues = continuations(byte_level)
    tokens = byte_level.encode("The capital", bos=False)
    assert not continues[byte_level.id_of("Ġ")] and continues[tokens[0]]
    with pytest.raises(TokenizerError, match="names no mask_token"):
        Masker(byte_level)

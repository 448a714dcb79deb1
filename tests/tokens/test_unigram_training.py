"""How a Unigram vocabulary is learned: equal to the library's in its way, and better in ours."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from bildung.core.errors import DataError, SettingsError
from bildung.data.text import documents
from bildung.tokens.unigram import Unigram
from bildung.tokens.unigram_training import Corpus, Removed, digamma, learn, prune, seeds

TEXTS = list(documents("mini:moby", limit=3))
WORDS = Counter(word for text in TEXTS for word in text.split())


@pytest.mark.parametrize("size", [300, 1500])
def test_comes_to_the_librarys_vocabulary_in_the_librarys_way(size: int) -> None:
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    library.train_from_iterator(TEXTS, trainer)
    ours = learn(WORDS, size - 1, as_tokenizers=True)
    assert {*ours.scores, "<unk>"} == set(library.get_vocab())


def test_pruning_goes_from_many_pieces_down_to_few_and_costs_likelihood() -> None:
    training = learn(WORDS, 400)
    sizes = [one.pieces for one in training.rounds]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 10 * 400 and len(training.scores) == 400
    first, last = training.rounds[0], training.rounds[-1]
    assert first.nats[1] < first.nats[0]  # EM raises the likelihood
    assert last.nats[-1] > training.rounds[1].nats[-1]  # fewer pieces explain the text less well
    assert {character for word in WORDS for character in word} <= set(training.scores)
    for one in training.rounds[:-1]:
        losses = [removed.loss for removed in one.removed if removed.uses]
        kept = [candidate.loss for candidate in one.kept]
        assert losses == sorted(losses) and kept == sorted(kept) and losses[-1] <= kept[0]
        assert all("".join(removed.instead) == removed.piece for removed in one.removed)
        uses = [removed.uses for removed in one.removed]
        assert 0 not in uses[sum(use == 0 for use in uses) :]  # the unused ones first


@pytest.mark.parametrize(("as_tokenizers", "grown"), [(False, 8 + 4), (True, 8 + 4 * 3)])
def test_the_loss_is_the_likelihood_that_removing_the_piece_costs(as_tokenizers: bool, grown: int) -> None:
    corpus = Corpus({"ab": 4, "a": 2, "b": 2}, ["ab", "a", "b"], 2)
    pruned = prune(corpus, np.array([-1.0, -2.0, -2.0]), [0, 1, 2], 2, as_tokenizers)
    # 8 pieces are used, "ab" 4 times. Without it "a" and "b" are used 6 times each, and all pieces 12 times.
    loss = 4 / 8 * (math.log(4 / 8) - 2 * math.log(6 / grown))
    assert pruned.removed == [Removed("ab", 4, ("a", "b"), pytest.approx(loss))]
    assert pruned.kept == [] and pruned.order == [1, 2]


def test_a_frequent_word_is_a_seed_even_when_no_longer_word_holds_it() -> None:
    words = {"Jehovah": 50, "ark": 1, "arm": 1}
    ours, theirs = seeds(words), seeds(words, as_tokenizers=True)
    assert "Jehovah" in ours and "Jehovah" not in theirs
    assert "ar" in ours and "rk" not in ours  # followed by k and m; once only
    assert ours["Jehovah"] > ours["ar"]


def test_fewer_tokens_than_in_the_librarys_way() -> None:
    words = {word: count for word, count in WORDS.items() if count > 1}

    def tokens(as_tokenizers: bool) -> int:
        model = Unigram(learn(words, 400, as_tokenizers=as_tokenizers).scores)
        return sum(count * len(model.best(word, 1)[0].pieces) for word, count in words.items())

    assert tokens(False) < 0.95 * tokens(True)


def test_scores_are_log_probabilities() -> None:
    scores = learn(WORDS, 400).scores
    assert 0.8 < sum(math.exp(score) for score in scores.values()) <= 1.01  # a tenth was cut away in the end
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert learn(WORDS, 400).scores == scores


def test_impossible_sizes_and_no_words() -> None:
    with pytest.raises(DataError, match="the training text is empty"):
        learn({}, 10)
    with pytest.raises(SettingsError, match="2 pieces are fewer than the 3 characters"):
        learn({"abc": 1}, 2)


def test_digamma() -> None:
    assert digamma(1.0) == pytest.approx(-0.57721566490153286, abs=1e-9)
    assert digamma(10.5) == pytest.approx(digamma(9.5) + 1 / 9.5, abs=1e-9)

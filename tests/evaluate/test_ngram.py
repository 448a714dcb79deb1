"""Kneser-Ney against its definition, counted with dictionaries."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from bildung.evaluate.ngram import kneser_ney_nats

V = 6


def by_definition(documents: list[list[int]], history: list[int], word: int, order: int) -> float:
    """p(word | history), the slow way."""
    padded = [[V] * (order - 1) + document for document in documents]

    def counts(n: int) -> Counter[tuple[int, ...]]:
        def grams(length: int) -> list[tuple[int, ...]]:
            found = []
            for document in padded:
                found += [tuple(document[e - length + 1 : e + 1]) for e in range(order - 1, len(document))]
            return found

        if n == order:
            return Counter(grams(n))
        longer = {tuple(d[e - n : e + 1]) for d in padded for e in range(order - 1, len(d))}
        return Counter(gram[1:] for gram in longer)

    def p(n: int) -> float:
        if n == 0:
            return 1 / V
        table = counts(n)
        context = tuple(([V] * (order - 1) + history)[-(n - 1) :]) if n > 1 else ()
        following = {gram[-1]: count for gram, count in table.items() if gram[:-1] == context}
        total = sum(following.values())
        if not total:
            return p(n - 1)
        ones, twos = (sum(count == k for count in table.values()) for k in (1, 2))
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        return max(following.get(word, 0) - discount, 0) / total + discount * len(following) / total * p(n - 1)

    return p(order)


@pytest.fixture
def documents() -> list[list[int]]:
    rng = random.Random(0)
    return [[min(int(rng.expovariate(0.7)), V - 1) for _ in range(rng.randint(1, 12))] for _ in range(14)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_definition(documents: list[list[int]], order: int) -> None:
    held_out = [[0, 1, 2, 0, 5, 5], [3], [1, 1, 1, 0]]
    expected = [
        -math.log(by_definition(documents, document[:at], word, order))
        for document in held_out
        for at, word in enumerate(document)
    ]
    found = kneser_ney_nats(documents, held_out, order=order, vocab_size=V)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_probabilities_add_up_to_one(documents: list[list[int]]) -> None:
    for history in ([], [0], [1, 0, 2], [5, 5, 5, 5]):
        words = [[*history, word] for word in range(V)]
        nats = kneser_ney_nats(documents, words, order=4, vocab_size=V)
        total = np.exp(-nats.reshape(V, -1)[:, -1]).sum()
        assert total == pytest.approx(1)


def test_longer_contexts_predict_a_regular_text_better() -> None:
    text = [[n % 3, (n + 1) % 3, n % 2 + 3] * 20 for n in range(12)]
    losses = [kneser_ney_nats(text, text, order=n, vocab_size=V).mean() for n in (1, 2, 3)]
    assert losses[0] > 1.5 * losses[1] and losses[1] > 1.5 * losses[2]


def test_a_long_text_takes_little_memory() -> None:
    """Some bytes per token of the text beside the text itself, whatever the order: no table of its n-grams is kept."""
    text = [np.random.default_rng(0).integers(500, size=2**18)]
    tracemalloc.start()
    kneser_ney_nats(text, [[1, 2, 3]], order=4, vocab_size=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 2**18

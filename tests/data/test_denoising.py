"""BART's damages: how much is masked, with how many masks, and that nothing but the masked spans is lost."""

import math
import random
from collections import Counter
from itertools import pairwise

import pytest
import tokenizers

from bildung.core.errors import DataError, TokenizerError
from bildung.data.denoising import denoising_examples, infill, permute_sentences, poisson, span_lengths
from bildung.tokens.tokenizer import Tokenizer
from tests.data.conftest import make_tokenizer

MASK = -1


@pytest.fixture(scope="module")
def bart():
    plain = make_tokenizer()
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    backend.add_special_tokens(["<mask>"])
    return Tokenizer(backend, {"eos_token": "<|im_end|>", "mask_token": "<mask>"})


def test_lengths_are_poissons():
    draws = random.Random(0)
    counts = Counter(poisson(3.0, draws) for _ in range(20000))
    for length in range(8):
        expected = math.exp(-3) * 3**length / math.factorial(length)
        assert counts[length] / 20000 == pytest.approx(expected, abs=0.01)


def test_spans_use_up_the_budget_exactly():
    draws = random.Random(0)
    assert all(sum(span_lengths(budget, 3.0, draws)) == budget for budget in range(1, 40))


def test_thirty_percent_goes_and_the_kept_tokens_stay_in_order():
    tokens = list(range(1000))
    source = infill(tokens, MASK, 0.3, 3.0, random.Random(1))
    kept = [token for token in source if token != MASK]
    assert len(kept) == 700
    assert kept == sorted(kept)
    # About one mask per 3 lost tokens; the 5 % of length 0 stand where nothing is missing.
    masks = source.count(MASK)
    assert 85 < masks < 125
    inserted = sum(source[at - 1] + 1 == source[at + 1] for at in range(1, len(source) - 1) if source[at] == MASK)
    assert 0 < inserted < 15
    assert all(not (a == b == MASK) for a, b in pairwise(source))


def test_short_texts_survive():
    for length in range(2, 12):
        for seed in range(50):
            source = infill(list(range(length)), MASK, 0.5, 3.0, random.Random(seed))
            kept = [token for token in source if token != MASK]
            assert MASK in source and kept == sorted(kept)


def test_sentences_are_permuted_whole():
    stop = 0
    tokens = [1, 2, stop, 3, stop, stop, 4, 5, stop, 6]
    seen = set()
    for seed in range(400):
        found = permute_sentences(tokens, frozenset([stop]), random.Random(seed))
        assert sorted(found) == sorted(tokens)
        text = " ".join(map(str, found))
        assert all(sentence in text for sentence in ("1 2 0", "3 0 0", "4 5 0", "6"))
        seen.add(text)
    assert len(seen) == 24  # all orders of four


def test_the_target_is_the_whole_text(bart):
    text = "The cat sat. It was an old cat, and it slept all day. Nobody knew why!"
    mask = bart.id_of("<mask>")
    (example,) = denoising_examples(bart, [text], 9, 128, seed=0)
    assert bart.decode(example.target.tokens[1:-1]) == text
    assert example.target.tokens[0] == 9 and example.source[-1] == example.target.tokens[-1] == bart.eos_id
    assert 0.6 < sum(token != mask for token in example.source[:-1]) / len(text) < 0.75
    (plain,) = denoising_examples(bart, [text], 9, 128, seed=0, permute=False)
    kept = iter(example.target.tokens[1:])
    assert all(token in kept for token in plain.source[:-1] if token != mask)  # a subsequence of the text
    kept = iter(example.target.tokens[1:])
    assert not all(token in kept for token in example.source[:-1] if token != mask)
    assert denoising_examples(bart, [text], 9, 128, seed=0) == [example]
    assert denoising_examples(bart, [text], 9, 128, seed=1) != [example]


def test_bad_input(bart):
    with pytest.raises(TokenizerError, match="mask_token"):
        denoising_examples(make_tokenizer(), ["some text"], 9, 32, seed=0)
    with pytest.raises(DataError, match="density"):
        denoising_examples(bart, ["some text"], 9, 32, seed=0, density=0.0)
    with pytest.raises(DataError, match="no room"):
        denoising_examples(bart, ["some text"], 9, 1, seed=0)

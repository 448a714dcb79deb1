"""T5's spans: how many, how long, where; and that source and target together hold the text."""

import random
from collections import Counter
from itertools import pairwise

import pytest
import tokenizers

from bildung.core.errors import DataError, TokenizerError
from bildung.data.span_corruption import corrupt, lengths, noise_spans, segments, sentinel_ids, span_examples
from bildung.tokens.tokenizer import Tokenizer
from tests.data.conftest import make_tokenizer

SENTINELS = [f"<extra_id_{n}>" for n in range(20)]


@pytest.fixture(scope="module")
def t5():
    plain = make_tokenizer()
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    backend.add_special_tokens(SENTINELS)
    return Tokenizer(backend, {"eos_token": "<|im_end|>"})


def test_the_papers_example():
    text = "Thank you for inviting me to your party last week".split()
    source, target = corrupt(text, [(2, 4), (8, 9)], ["<X>", "<Y>", "<Z>"])
    assert " ".join(source) == "Thank you <X> me to your party <Y> week"
    assert " ".join(target) == "<X> for inviting <Y> last"


def test_lengths_are_those_of_the_authors_code():
    """A source of 512 tokens takes 568 of text and a target of 114 (t5/data/preprocessors.py: random_spans_helper)."""
    assert lengths(512) == (568, 114)
    for max_length in range(16, 200):
        text, target = lengths(max_length)
        spans = noise_spans(text, 0.15, 3.0, random.Random(0))
        lost = sum(end - start for start, end in spans)
        assert text - lost + len(spans) + 1 <= max_length
        assert lost + len(spans) + 1 == target


def test_as_many_tokens_and_spans_go_as_the_paper_says():
    for length in (20, 100, 568):
        spans = noise_spans(length, 0.15, 3.0, random.Random(length))
        lost = sum(end - start for start, end in spans)
        assert lost == round(0.15 * length)
        assert len(spans) == round(lost / 3)
        assert spans[0][0] > 0  # begins with a kept token
        assert spans[-1][1] == length  # ends with a lost one
        assert all(end < start for (_, end), (start, _) in pairwise(spans))  # never touching
    assert len(noise_spans(2, 0.15, 3.0, random.Random(0))) == 1
    assert len(noise_spans(10, 0.9, 3.0, random.Random(0))) == 1  # no more spans than kept tokens


def test_every_division_is_equally_likely():
    draws = random.Random(1)
    counts = Counter(tuple(segments(6, 3, draws)) for _ in range(10000))
    assert len(counts) == 10  # 5 borders, 2 of them chosen
    assert all(sum(parts) == 6 and min(parts) >= 1 for parts in counts)
    assert all(abs(count - 1000) < 120 for count in counts.values())


def test_source_and_target_together_hold_the_text(t5):
    text = "".join(random.Random(3).choice("abcdefgh ") for _ in range(300))
    examples = span_examples(t5, [text], 9, 64, seed=0)
    ids = sentinel_ids(t5)
    whole = []
    for example in examples:
        assert len(example.source) <= 64
        assert example.source[-1] == t5.eos_id == example.target.tokens[-1]
        assert example.target.tokens[0] == 9 and not example.target.loss_mask[0] and all(example.target.loss_mask[1:])
        spans, current = {}, None
        for token in example.target.tokens[1:-1]:
            if token in ids:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        assert list(spans) == ids[: len(spans)]
        for token in example.source[:-1]:
            whole += spans.get(token, [token])
    assert t5.decode(whole) == text
    assert len(examples[0].source) == 64  # a full piece needs no padding


def test_they_are_a_function_of_the_seed(t5):
    texts = ["a long enough text to lose some spans of it, here and there"]
    assert span_examples(t5, texts, 9, 32, seed=1) == span_examples(t5, texts, 9, 32, seed=1)
    assert span_examples(t5, texts, 9, 32, seed=1) != span_examples(t5, texts, 9, 32, seed=2)


def test_bad_input(t5):
    with pytest.raises(TokenizerError, match="extra_id_0"):
        sentinel_ids(make_tokenizer())
    with pytest.raises(TokenizerError, match="20"):
        span_examples(t5, ["x" * 2000], 9, 1000, seed=0)
    with pytest.raises(DataError, match="density"):
        span_examples(t5, ["x" * 20], 9, 32, seed=0, density=1.0)
    with pytest.raises(DataError, match="no room"):
        span_examples(t5, ["x" * 20], 9, 3, seed=0)
    with pytest.raises(DataError, match="no example"):
        span_examples(t5, ["x"], 9, 32, seed=0)

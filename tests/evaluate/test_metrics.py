"""Standard errors: golden values, agreement with the textbook formulas, and pairing."""

from __future__ import annotations

import math
import statistics

import pytest

from bildung.core.errors import DataError
from bildung.evaluate.metrics import METRICS, as_json, estimate, exact_match, paired_difference


def test_accuracy_golden():
    made = estimate("acc", [1.0] * 60 + [0.0] * 40)
    assert made.value == 0.6 and made.n == 100
    assert made.stderr == pytest.approx(0.049236596, abs=1e-9)  # what lm-eval prints


def test_a_mean_has_the_sample_standard_error():
    items = [0.2, 0.9, 0.4, 0.4, 0.7]
    assert estimate("acc", items).stderr == pytest.approx(statistics.stdev(items) / math.sqrt(5))


def test_perplexity_divides_sums_and_not_means():
    items = [(2.0, 1), (30.0, 9)]
    assert estimate("perplexity", items).value == pytest.approx(math.exp(32 / 10))


def test_standard_error_of_a_perplexity_by_hand():
    items = [(2.0, 1.0), (30.0, 9.0), (10.0, 5.0)]
    ratio = 42 / 15
    residuals = [x - ratio * c for x, c in items]
    expected = math.exp(ratio) * math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 15
    assert estimate("perplexity", items).stderr == pytest.approx(expected)


def test_texts_of_one_perplexity_have_no_error():
    assert estimate("perplexity", [(3.0, 1), (6.0, 2), (30.0, 10)]).stderr == pytest.approx(0, abs=1e-12)


def test_one_bit_per_byte():
    nats = 100 * math.log(2)  # log-likelihood = -bytes · ln 2
    assert estimate("byte_perplexity", [(nats, 100)]).value == pytest.approx(2.0)
    assert estimate("bits_per_byte", [(100.0, 100)]).value == pytest.approx(1.0)


def test_one_item_has_no_standard_error():
    assert estimate("acc", [1.0]).stderr is None


def test_pairing_golden():
    made = paired_difference("acc", [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    # differences 0 1 0 0: mean 1/4, standard deviation 1/2, over sqrt(4)
    assert (made.value, made.n) == (0.25, 4) and made.stderr == pytest.approx(0.25)


def test_pairing_sees_what_single_errors_hide():
    before = [(float(n % 7), 1.0) for n in range(70)]
    after = [(x + 0.01 * (1 + n % 2), 1.0) for n, (x, _) in enumerate(before)]
    made = paired_difference("perplexity", before, after)
    single = estimate("perplexity", before).stderr
    assert made.value > 2 * made.stderr and made.stderr < single / 20


def test_a_model_does_not_differ_from_itself():
    items = [(2.0, 1.0), (30.0, 9.0), (10.0, 5.0)]
    made = paired_difference("perplexity", items, items)
    assert made.value == 0 and made.stderr == 0


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(DataError, match="2 and 1 items"):
        paired_difference("acc", [1.0, 0.0], [1.0])
    with pytest.raises(DataError, match="no items"):
        estimate("acc", [])
    with pytest.raises(DataError, match="did you mean 'perplexity'"):
        estimate("perplexty", [1.0])


def test_a_hopeless_perplexity_stays_a_number():
    made = estimate("perplexity", [(1e6, 1), (2e6, 1)])
    assert math.isfinite(made.value) and made.stderr is None


def test_exact_match():
    assert exact_match("Paris", "Paris") == 1.0 and exact_match("paris", "Paris") == 0.0
    assert exact_match("paris.", "Paris", ignore_case=True, ignore_punctuation=True) == 1.0
    assert exact_match("about 3,000", "3000", regexes_to_ignore=(",", "about ")) == 1.0


def test_a_card_entry_can_be_recomputed_from_its_items():
    entry = as_json("perplexity", [(2.123456, 3), (9.87654321, 4)])
    assert entry["items"] == [[2.1235, 3.0], [9.8765, 4.0]]
    assert entry["value"] == estimate("perplexity", entry["items"]).value
    assert entry["higher_is_better"] is METRICS["perplexity"].higher_is_better is False

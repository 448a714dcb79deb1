"""Numbers with their uncertainty: mean ± standard error, and the paired difference of two models on the same items.

Every metric here is a ratio of sums over items, R = Σ x_i / Σ c_i: accuracy has c = 1, perplexity is exp(R) with x the
nats and c the tokens of a text. A ratio's standard error comes from each item's influence on it (linearisation, the
delta method; Cochran, Sampling Techniques, 3rd ed., eq. 6.13):

    e_i = g'(R) (x_i - R c_i) / Σ c          stderr = sqrt( m / (m - 1) Σ e_i² )          g = identity or exp

For a mean this is exactly the sample standard deviation over sqrt(m), which lm-eval prints. Two models measured on the
same items have a difference with influences e_i(b) - e_i(a): what is hard for both cancels, so the paired standard
error is far smaller than the two single ones suggest. Items must be independent: whole texts, not tokens.

BLEU and its like (sequence_metrics.py) are other functions of summed counts. Their error comes from a bootstrap: the
spread of the score over corpora drawn from this one with replacement, for a difference the same ones for both models
(Koehn 2004). It is seeded, so it repeats.
"""

from __future__ import annotations

import math
import re
import statistics
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bildung.core.errors import DataError, nearest
from bildung.evaluate.sequence_metrics import SEQUENCE_METRICS, score_of_sums

Item = float | Sequence[float]  # a value, or (sum, count)


@dataclass(frozen=True)
class Metric:
    """What a number means. `exponential`: the value is exp(R). `summed`: another function of the items' sums."""

    higher_is_better: bool
    exponential: bool = False
    summed: bool = False


METRICS = {
    "acc": Metric(higher_is_better=True),  # multiple choice: the most probable choice; likelihood: greedy says the same
    "acc_norm": Metric(higher_is_better=True),  # the most probable choice per character
    "exact_match": Metric(higher_is_better=True),
    "perplexity": Metric(higher_is_better=False, exponential=True),  # items (nats, tokens)
    "word_perplexity": Metric(higher_is_better=False, exponential=True),  # items (nats, words split at white space)
    "byte_perplexity": Metric(higher_is_better=False, exponential=True),  # items (nats, UTF-8 bytes)
    "bits_per_byte": Metric(higher_is_better=False),  # items (bits, UTF-8 bytes)
    **{name: Metric(name in ("bleu", "chrf"), summed=True) for name in SEQUENCE_METRICS},
}
RESAMPLES = 1000  # of a bootstrap


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error; None for the error of fewer than two items."""

    value: float
    stderr: float | None
    n: int


def metric_called(name: str) -> Metric:
    """What the name stands for. Raises DataError with the nearest one."""
    if name not in METRICS:
        raise DataError(f"no metric {name!r}. {nearest(name, METRICS)} There are: {', '.join(METRICS)}")
    return METRICS[name]


def estimate(name: str, items: Sequence[Item]) -> Estimate:
    """The metric over its items."""
    if metric_called(name).summed:
        sums, drawn = _resampled(items)
        return Estimate(score_of_sums(name, sums), _spread([score_of_sums(name, one) for one in drawn]), len(items))
    value, influence = _linearised(metric_called(name), items)
    return Estimate(value, _stderr(influence), len(items))


def paired_difference(name: str, a: Sequence[Item], b: Sequence[Item]) -> Estimate:
    """The metric of `b` minus that of `a`, with the standard error that the pairing leaves. Item i of both is the same
    question. Raises DataError when the numbers of items differ."""
    if len(a) != len(b):
        raise DataError(f"{name}: {len(a)} and {len(b)} items cannot be paired; measure both on the same ones")
    metric = metric_called(name)
    if metric.summed:
        (sums_a, drawn_a), (sums_b, drawn_b) = _resampled(a), _resampled(b)
        pairs = zip(drawn_a, drawn_b, strict=True)
        spread = _spread([score_of_sums(name, after) - score_of_sums(name, before) for before, after in pairs])
        return Estimate(score_of_sums(name, sums_b) - score_of_sums(name, sums_a), spread, len(a))
    (value_a, influence_a), (value_b, influence_b) = _linearised(metric, a), _linearised(metric, b)
    influence = [after - before for before, after in zip(influence_a, influence_b, strict=True)]
    return Estimate(value_b - value_a, _stderr(influence), len(a))


def _linearised(metric: Metric, items: Sequence[Item]) -> tuple[float, list[float]]:
    """The value, and each item's influence on it."""
    if not items:
        raise DataError("a metric of no items")
    pairs = [(float(item), 1.0) if isinstance(item, int | float) else (item[0], item[1]) for item in items]
    total, count = math.fsum(x for x, _ in pairs), math.fsum(c for _, c in pairs)
    if count <= 0:
        raise DataError("a metric whose items count nothing")
    ratio = total / count
    value = math.exp(min(ratio, 700.0)) if metric.exponential else ratio  # exp(710) overflows
    slope = value if metric.exponential else 1.0
    return value, [slope * (x - ratio * c) / count for x, c in pairs]


def _resampled(items: Sequence[Any]) -> tuple[list[float], list[list[float]]]:
    """Sums over the items, and over RESAMPLES drawings of as many items with replacement, the same for every metric."""
    import numpy

    if not items:
        raise DataError("a metric of no items")
    table = numpy.asarray(items, dtype=numpy.float64)
    if len(items) < 2:
        return table.sum(axis=0).tolist(), []
    times = numpy.random.default_rng(0).multinomial(len(items), [1 / len(items)] * len(items), size=RESAMPLES)
    return table.sum(axis=0).tolist(), (times @ table).tolist()


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if values else None


def _stderr(influence: Sequence[float]) -> float | None:
    """None where there is no finite one: fewer than two items, or a perplexity beyond all numbers."""
    m = len(influence)
    error = math.sqrt(m / (m - 1) * math.fsum(e * e for e in influence)) if m > 1 else math.inf
    return error if math.isfinite(error) else None


def exact_match(
    answer: str,
    target: str,
    *,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    regexes_to_ignore: Sequence[str] = (),
) -> float:
    """1.0 when the answer is the target, after removing what is to be ignored (lm-eval's exact_match_hf_evaluate)."""
    return float(
        _normal(answer, ignore_case, ignore_punctuation, regexes_to_ignore)
        == _normal(target, ignore_case, ignore_punctuation, regexes_to_ignore)
    )


def _normal(text: str, ignore_case: bool, ignore_punctuation: bool, regexes: Sequence[str]) -> str:
    for pattern in regexes:
        text = re.sub(pattern, "", text)
    text = text.lower() if ignore_case else text
    return text.translate(str.maketrans("", "", string.punctuation)) if ignore_punctuation else text


def as_json(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """A metric as it stands in a card: value, standard error, n, and the items, rounded, for pairing."""
    rounded: list[Any] = [
        round(float(item), 4) if isinstance(item, int | float) else [round(float(x), 4) for x in item] for item in items
    ]
    # The estimate is made from the rounded items, so that whoever recomputes it from a card finds the same.
    made = estimate(name, rounded)
    return {
        "metric": name,
        "value": made.value,
        "stderr": made.stderr,
        "n": made.n,
        "higher_is_better": METRICS[name].higher_is_better,
        "items": rounded,
    }

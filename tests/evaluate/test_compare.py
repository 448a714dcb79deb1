"""Two models side by side: paired cards, and divergence of their predictions against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch

import bildung
from bildung.core.errors import DataError
from bildung.evaluate.compare import compare_cards, model_difference, unpaired
from bildung.evaluate.likelihood import rolling

TEXTS = ["The capital of France is Paris. The capital of Germany is Berlin.", "It is Madrid, in the middle.", "x y z"]


def entry(*items, metric="acc", docs="d", better=True):
    items = list(items)
    return {
        "metric": metric,
        "value": sum(items) / len(items),
        "stderr": 0.1,
        "n": len(items),
        "higher_is_better": better,
        "items": items,
        "docs": docs,
    }


def test_cards_are_paired_item_by_item():
    [made] = compare_cards({"tasks": {"t": entry(1.0, 0.0, 1.0, 0.0)}}, {"tasks": {"t": entry(1.0, 1.0, 1.0, 0.0)}})
    assert (made.a, made.b, made.difference, made.n) == (0.5, 0.75, 0.25, 4)
    assert made.stderr == pytest.approx(0.25) and not made.significant and made.better is None


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_more_than_two_standard_errors_is_significant(higher_is_better):
    low, high = entry(*[0.0] * 20, better=higher_is_better), entry(*[1.0] * 19, 0.0, better=higher_is_better)
    [made] = compare_cards({"tasks": {"t": low}}, {"tasks": {"t": high}})
    assert made.significant and made.better is higher_is_better


def test_what_cannot_be_paired_is_named():
    a = {"tasks": {"same": entry(1.0), "docs": entry(1.0), "n": entry(1.0, 0.0), "only a": entry(1.0)}}
    b = {"tasks": {"same": entry(0.0), "docs": entry(1.0, docs="e"), "n": entry(1.0), "only b": entry(1.0)}}
    assert [made.task for made in compare_cards(a, b)] == ["same"]
    assert [line.split(" was")[0] for line in unpaired(a, b)] == ["docs", "n", "only a", "only b"]
    del a["tasks"]["same"]["items"]  # as in an ancestor's record
    assert compare_cards(a, b) == [] and compare_cards({}, b) == []


def by_hand(a, b, context):
    """KL, same top token, largest gap, surprisals: token by token in double precision."""
    kl, same, gap, nll = [], [], [], []
    for text in TEXTS:
        for window in rolling(a.tokenizer, text, context):
            tokens = torch.tensor([window.tokens])
            logits_a, logits_b = (lm.model(tokens[:, :-1])[0].detach().double() for lm in (a, b))
            for i, is_target in enumerate(window.loss_mask[1:]):
                if is_target:
                    p, q = logits_a[i].log_softmax(-1), logits_b[i].log_softmax(-1)
                    kl.append(float((p.exp() * (p - q)).sum()))
                    same.append(float(p.argmax() == q.argmax()))
                    gap.append(float((logits_a[i] - logits_b[i]).abs().max()))
                    nll.append((-float(p[tokens[0, i + 1]]), -float(q[tokens[0, i + 1]])))
    return kl, same, gap, nll


@pytest.mark.parametrize(("context", "batch_tokens"), [(64, 2048), (10, 25)])
def test_model_difference_by_hand(tiny_lm, tiny_lm_directory, context, batch_tokens):
    other = bildung.load(tiny_lm_directory)
    for linear in other.model.linears().values():
        linear.base.weight.data.mul_(1.05)
    kl, same, gap, nll = by_hand(tiny_lm, other, context)
    made = model_difference(tiny_lm, other, TEXTS, context=context, batch_tokens=batch_tokens)
    count = len(kl)
    assert made["tokens"] == count
    assert made["kl_mean"] == pytest.approx(sum(kl) / count, rel=1e-4) and made["kl_mean"] > 0.001
    assert made["kl_median"] == pytest.approx(sorted(kl)[(count - 1) // 2], rel=1e-3)
    assert made["kl_999"] == pytest.approx(max(kl), rel=1e-3)
    assert made["same_top"] == pytest.approx(sum(same) / count)
    assert made["max_logit_difference"] == pytest.approx(max(gap), rel=1e-4)
    assert made["perplexity_a"] == pytest.approx(math.exp(sum(a for a, _ in nll) / count), rel=1e-4)
    assert made["perplexity_b"] == pytest.approx(math.exp(sum(b for _, b in nll) / count), rel=1e-4)
    assert 0 < made["kl_stderr"] < made["kl_mean"] * 2


def test_a_model_does_not_differ_from_itself(tiny_lm):
    made = model_difference(tiny_lm, tiny_lm, TEXTS, dtype=torch.bfloat16)
    assert (made["kl_mean"], made["same_top"], made["max_logit_difference"]) == (0.0, 1.0, 0.0)
    assert {parameter.dtype for parameter in tiny_lm.model.parameters()} == {torch.float32}


def test_the_direction_counts(tiny_lm, tiny_lm_directory):
    other = bildung.load(tiny_lm_directory)
    other.model.model.norm.weight.data.mul_(3)
    forth, back = model_difference(tiny_lm, other, TEXTS), model_difference(other, tiny_lm, TEXTS)
    assert forth["kl_mean"] != pytest.approx(back["kl_mean"], rel=0.05)
    assert forth["perplexity_a"] == pytest.approx(back["perplexity_b"])


def test_one_text_has_no_standard_error(tiny_lm):
    assert math.isnan(model_difference(tiny_lm, tiny_lm, TEXTS[:1])["kl_stderr"])


def test_what_cannot_be_compared_is_an_error(tiny_lm):
    with pytest.raises(DataError, match="no text"):
        model_difference(tiny_lm, tiny_lm, [])
    from dataclasses import replace

    from bildung.model.config import from_dict
    from tests.conftest import CONFIG

    other = replace(tiny_lm, config=from_dict({**CONFIG, "vocab_size": 400}))
    with pytest.raises(DataError, match="320 and 400 tokens share no logits"):
        model_difference(tiny_lm, other, TEXTS)

"""The Fisher information against analysis, whatever the batch size, by either way of computing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bildung.continual.fisher import covered, diagonal_fisher
from bildung.continual.tasks import Conversations, LabelledTexts
from bildung.core.errors import SettingsError, TrainingError
from bildung.data.batches import Example, pad
from bildung.model.linear import dense_linear
from bildung.model.store import LanguageModel
from bildung.train.checkpoint import trained
from bildung.tune.lora import Settings as Lora
from bildung.tune.lora import add_lora
from tests.model.tiny_encoder import tiny_encoder

N, F, C = 24, 5, 3  # examples, features, classes


@dataclass(frozen=True)
class Inputs:
    """x_BF and labels_B of a softmax regression."""

    x_BF: Tensor
    labels_B: Tensor

    def to(self, device: Any) -> Inputs:
        return self


class Regression(nn.Module):
    """p(c | x) = softmax(W x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = dense_linear(F, C, bias=True, name="head")
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7, generator=torch.Generator().manual_seed(1))

    def logp(self, batch: Inputs) -> Tensor:
        return self.head(batch.x_BF).log_softmax(-1)


def exact(model: Regression, batch: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    logp_BC = model.logp(batch)
    for c in range(C):
        yield logp_BC.detach()[:, c].exp(), -logp_BC[:, c]


def empirical(model: Regression, batch: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    logp_BC = model.logp(batch)
    yield torch.ones(len(logp_BC)), -logp_BC.gather(1, batch.labels_B[:, None])[:, 0]


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(2)
    return Inputs(torch.randn(N, F, generator=generator), torch.randint(0, C, (N,), generator=generator))


def batches(size: int) -> list[Inputs]:
    whole = inputs()
    return [Inputs(whole.x_BF[n : n + size], whole.labels_B[n : n + size]) for n in range(0, N, size)]


@pytest.mark.parametrize("by_recorder", [True, False])
def test_softmax_regression_has_the_analytic_fisher_information(by_recorder: bool) -> None:
    """F of W_ci is the mean of p_c (1 - p_c) x_i², that of b_c the mean of p_c (1 - p_c)."""
    model, whole = Regression(), inputs()
    p_NC = model.logp(whole).detach().exp()
    variance_NC = p_NC * (1 - p_NC)
    found = diagonal_fisher(model, batches(7), exact, by_recorder=by_recorder)
    expected = variance_NC.t() @ whole.x_BF.square() / N
    torch.testing.assert_close(found["head.base.weight"], expected)
    torch.testing.assert_close(found["head.bias"], variance_NC.mean(0))


def test_the_empirical_fisher_information_is_the_mean_of_squared_residuals() -> None:
    model, whole = Regression(), inputs()
    residual_NC = model.logp(whole).detach().exp() - nn.functional.one_hot(whole.labels_B, C)
    expected = residual_NC.square().t() @ whole.x_BF.square() / N
    found = diagonal_fisher(model, batches(5), empirical)
    torch.testing.assert_close(found["head.base.weight"], expected)


@pytest.mark.parametrize("by_recorder", [True, False])
def test_the_batch_size_changes_nothing(by_recorder: bool) -> None:
    model = Regression()
    one, many = (diagonal_fisher(model, batches(size), empirical, by_recorder=by_recorder) for size in (1, N))
    for name, fisher in one.items():
        torch.testing.assert_close(fisher, many[name])


def test_the_square_of_a_batch_mean_is_another_number() -> None:
    """The mutant that public code computes: 24 examples at once make it many times too small."""
    model, whole = Regression(), inputs()
    (_, nll_N) = next(empirical(model, whole))
    (mean,) = torch.autograd.grad(nll_N.mean(), [model.head.base.weight])
    right = diagonal_fisher(model, batches(N), empirical)["head.base.weight"]
    assert float(right.sum() / mean.square().sum()) > N / 4


def text_batch(lm: LanguageModel) -> tuple[LabelledTexts, list[Any]]:
    kind = LabelledTexts(16, own_heads=True)
    kind.classes, kind.groups = {"a/0": 0, "a/1": 1, "b/0": 2, "b/1": 3, "b/2": 4}, [0, 0, 1, 1, 1]
    texts = ["the cat sat", "a dog ran on the mat", "day and night", "red", "the big day saw a small cat"]
    rows = [{"text": text, "label": label} for text, label in zip(texts, kind.classes, strict=True)]
    return kind, kind.encode(lm.tokenizer, rows)


@pytest.fixture
def classifier() -> LanguageModel:
    return tiny_encoder("BertForSequenceClassification", num_labels=5, initializer_range=0.2)


@pytest.mark.parametrize("how", ["empirical", "exact"])
def test_an_encoder_by_recorder_and_example_by_example(classifier: LanguageModel, how: Any) -> None:
    model = classifier.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".base." in name or name.endswith("proj.bias"))
    assert covered(model, trained(model))
    kind, items = text_batch(classifier)
    batch = kind.collate(items, 0)
    fast = diagonal_fisher(model, [batch], kind.outcomes(how, 0))
    slow = diagonal_fisher(model, [batch], kind.outcomes(how, 0), by_recorder=False)
    assert len(fast) > 12 and all(bool((one > 0).any()) for one in fast.values())
    for name, fisher in fast.items():
        torch.testing.assert_close(fisher, slow[name], atol=1e-7, rtol=1e-3)


def test_norms_and_embeddings_take_the_way_example_by_example(classifier: LanguageModel) -> None:
    model = classifier.model.requires_grad_(True)
    assert not covered(model, trained(model))
    kind, items = text_batch(classifier)
    found = diagonal_fisher(model, [kind.collate(items, 0)], kind.outcomes("empirical", 0))
    assert set(found) == set(trained(model)) and float(found["model.embed_tokens.weight"].sum()) > 0


def test_the_factors_of_a_lora(tiny_lm: LanguageModel) -> None:
    add_lora(tiny_lm.model, Lora(data="", rank=3, target=("q_proj", "down_proj")))
    for name, parameter in trained(tiny_lm.model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(4))
    examples = [
        Example([0, 5, 6, 7, 8], [False, False, True, True, True]),
        Example([0, 9, 10], [False, True, True]),
        Example([0, 9, 11, 12], [False, False, False, True]),
    ]
    batch = pad(examples, 2)
    of = Conversations(16).outcomes("empirical", 0)
    assert covered(tiny_lm.model, trained(tiny_lm.model))
    fast = diagonal_fisher(tiny_lm.model, [batch], of)
    slow = diagonal_fisher(tiny_lm.model, [batch], of, by_recorder=False)
    assert len(fast) == 8
    for name, fisher in fast.items():
        torch.testing.assert_close(fisher, slow[name], atol=1e-9, rtol=1e-3)


def test_true_outcomes_are_drawn_from_the_model(classifier: LanguageModel, tiny_lm: LanguageModel) -> None:
    """Many draws come near the exact sum; conversations have too many outcomes for that."""
    model = classifier.model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    kind, items = text_batch(classifier)
    batch = kind.collate(items, 0)
    expected = diagonal_fisher(model, [batch], kind.outcomes("exact", 0))["classifier.out_proj.bias"]
    drawn = diagonal_fisher(model, [batch] * 150, kind.outcomes("true", 0))["classifier.out_proj.bias"]
    torch.testing.assert_close(drawn, expected, rtol=0.25, atol=0.003)
    with pytest.raises(SettingsError, match="too many"):
        Conversations(16).outcomes("exact", 0)


def test_without_an_example_there_is_nothing_to_measure() -> None:
    with pytest.raises(TrainingError, match="no example"):
        diagonal_fisher(Regression(), [], exact)

"""Which tokens of the input mattered: gradient times input, integrated gradients, attention rollout.

f is one number of the model: a class logit of a classifier, the logit of the next token of a language model, of the
masked one of an encoder, of the next token of an answer to a source (asked.py). Of the last, the tokens are those of
the source, then those of the answer so far.

    gradient x input       x · ∂f/∂x                    of each token's vector x; first order, at one point
    integrated gradients   (x - x') · ∫ ∂f/∂x(x' + t (x - x')) dt      from a baseline x' (Sundararajan et al. 2017)
    attention rollout      Π over layers of (A + I) / 2, A the mean over heads        (Abnar & Zuidema 2020)

Integrated gradients are complete: the tokens' shares add up to f(x) - f(x'). The integral is taken at Gauss-Legendre
points, and `gap` says what is missing. The baseline matters: behind an RMS norm the zero vector is a point where f
jumps (a norm does not see how long a vector is), so the default is the mean token vector. Rollout sees neither values
nor feed-forward layers, and has no sign. Through cross-attention C it goes on from what flowed to the source's last
states: (C · E + D) / 2, D what flowed to the answer's states.
"""

# L tokens, S of them a source's, D embedding, K points on the path, I inputs: one, or source and answer

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.look.asked import Asked
from bildung.model.store import LanguageModel
from bildung.model.taps import Tap, intervene, observe

Method = Literal["gradient_x_input", "integrated_gradients", "rollout"]
AT_ONCE = 16  # points of the path that go through the model together


@dataclass
class Saliency:
    """A number per token. value: f(x). baseline: f(x'), and gap what integrated gradients miss of value - baseline."""

    scores_L: Tensor
    value: float | None
    baseline: float | None = None
    gap: float | None = None


def outputs(model: Any, tokens_BL: Tensor) -> Tensor:
    """BC or BV: what is explained. Raises DataError for a model that has nothing to say."""
    return _asked(model).logits(tokens_BL)


def _asked(model: Any) -> Asked:
    return model if isinstance(model, Asked) else Asked(model)


def gradient_x_input(model: Any, tokens_L: Sequence[int], target: int) -> Saliency:
    """x · ∂f/∂x for every token. f is output number `target`."""
    told, tokens_1L = _asked(model), torch.tensor([list(tokens_L)], device=model.device)
    sites = _embed_sites(told)
    with torch.enable_grad(), observe(told, sites) as seen:
        value = told.logits(tokens_1L)[0, target]
    x_I = [seen[site] for site in sites]
    if not all(x.requires_grad for x in x_I):  # frozen weights: start the graph at the vectors
        x_I = [x.detach() for x in x_I]
        return _at_points(told, tokens_1L, target, x_I, [torch.zeros_like(x) for x in x_I], np.ones(1), np.ones(1))
    gradients = torch.autograd.grad(value, x_I)
    shares = [(x * gradient)[0].sum(-1) for x, gradient in zip(x_I, gradients, strict=True)]
    return Saliency(torch.cat(shares).detach().double().cpu(), float(value.detach()))


def integrated_gradients(
    model: Any, tokens_L: Sequence[int], target: int, *, baseline_D: Tensor | None = None, points: int = 64
) -> Saliency:
    """The tokens' shares of f(x) - f(x'). baseline_D: the vector of x' at every token; default: their mean."""
    if points < 1:
        raise DataError(f"points = {points}; at least one point of the path is needed.")
    told, tokens_1L = _asked(model), torch.tensor([list(tokens_L)], device=model.device)
    sites = _embed_sites(told)
    with torch.no_grad(), observe(told, sites) as seen:
        value = float(told.logits(tokens_1L)[0, target])
    x_I = [seen[site].detach() for site in sites]
    start_D = mean_vector(told) if baseline_D is None else baseline_D
    start_I = [start_D.to(x).expand_as(x) for x in x_I]
    with torch.no_grad(), intervene(told, _putting(sites, start_I)):
        baseline = float(told.logits(tokens_1L)[0, target])
    nodes_K, weights_K = np.polynomial.legendre.leggauss(points)
    found = _at_points(told, tokens_1L, target, x_I, start_I, (nodes_K + 1) / 2, weights_K / 2)
    gap = value - baseline - float(found.scores_L.sum())
    return Saliency(found.scores_L, value, baseline, gap)


def _at_points(
    model: Asked,
    tokens_1L: Tensor,
    target: int,
    x_I: Sequence[Tensor],
    start_I: Sequence[Tensor],
    at: np.ndarray,
    weights: np.ndarray,
) -> Saliency:
    """(x - x') · Σ_k w_k ∂f/∂x at x' + t_k (x - x')."""
    sites, totals = _embed_sites(model), [torch.zeros_like(x[0], dtype=torch.float64) for x in x_I]
    value = 0.0
    for first in range(0, len(at), AT_ONCE):
        t_K11 = torch.tensor(at[first : first + AT_ONCE], dtype=x_I[0].dtype, device=x_I[0].device)[:, None, None]
        w_K11 = torch.tensor(weights[first : first + AT_ONCE], device=x_I[0].device)[:, None, None]
        points_I = [
            (start + t_K11 * (x - start)).requires_grad_() for x, start in zip(x_I, start_I, strict=True)
        ]  # each K L D
        with torch.enable_grad(), intervene(model, _putting(sites, points_I)):
            values_K = model.logits(tokens_1L.expand(len(t_K11), -1))[:, target]
            gradients = torch.autograd.grad(values_K.sum(), points_I)
        for total, gradient in zip(totals, gradients, strict=True):
            total += (w_K11 * gradient.double()).sum(0)
        value = float(values_K[-1].detach())
    triples = zip(x_I, start_I, totals, strict=True)
    return Saliency(torch.cat([((x - start)[0].double() * total).sum(-1) for x, start, total in triples]).cpu(), value)


def _putting(sites: Sequence[str], vectors: Sequence[Tensor]) -> dict[str, Tap]:
    """Interventions: these vectors instead of the tokens'."""

    def putting(there: Tensor) -> Tap:
        return lambda _: there

    return {site: putting(there) for site, there in zip(sites, vectors, strict=True)}


@torch.no_grad()
def rollout(model: Any, tokens_L: Sequence[int]) -> Tensor:
    """How much of each state after the last layer flows from each input token, rows sum to 1: LL; of an encoder-decoder
    the states of its answer, from the source's tokens and the answer's. Raises DataError where there is no attention of
    a token to tokens."""
    told = _asked(model)
    patterns = [site for site in told.sites if site.endswith(".probs") and "layers." in site]
    if not patterns:
        raise DataError(f"a {told.config.model_type} has no attention to roll out; take a gradient method.")
    with observe(told, patterns) as seen:
        told.logits(torch.tensor([list(tokens_L)], device=told.device))
    S, L = (len(tokens_L), len(told.answer)) if told.answers_source else (0, len(tokens_L))
    read = torch.eye(S, S + L, dtype=torch.float64)  # what flowed to the source's states
    flow = torch.eye(S + L, dtype=torch.float64)[S:]  # and to the others'
    for site in patterns:
        probs = seen[site][0].double().mean(0).cpu()
        if site.startswith("encoder."):
            read = _mixed(probs[:, -S:], read, read)
        elif site.endswith("cross.probs"):
            flow = _mixed(probs[:, -S:], read, flow)
        else:
            flow = _mixed(probs[:, -L:], flow, flow)
    return flow


def _mixed(probs_LS: Tensor, seen_SI: Tensor, own_LI: Tensor) -> Tensor:
    """(A X + Y) / 2: half of what is looked at, half of what was there; what looks at virtual tokens is left out."""
    mixed = probs_LS @ seen_SI + own_LI
    return mixed / mixed.sum(-1, keepdim=True)


def mean_vector(model: Any) -> Tensor:
    """D: the mean of all token vectors, scaled as the family scales them."""
    mean_D: Tensor = model.embedding.weight.detach().float().mean(0)
    return mean_D * getattr(model.config, "embed_scale", 1.0)


def token_vector(lm: LanguageModel, number: int) -> Tensor:
    """D: one token's vector, the same way."""
    vector_D: Tensor = lm.model.embedding.weight.detach()[number].float()
    return vector_D * getattr(lm.config, "embed_scale", 1.0)


def _embed_sites(model: Asked) -> list[str]:
    """Where the tokens' vectors pass: of the text, and of what has been answered so far."""
    return [f"{model.stack}embed", *(["decoder.embed"] if model.answers_source else [])]

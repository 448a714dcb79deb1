"""Which tokens of the input mattered: gradient times input, integrated gradients, attention rollout.

f is one number of the model: a class logit of a classifier, the logit of a next token of a language model.

    gradient x input       x · ∂f/∂x                    of each token's vector x; first order, at one point
    integrated gradients   (x - x') · ∫ ∂f/∂x(x' + t (x - x')) dt      from a baseline x' (Sundararajan et al. 2017)
    attention rollout      Π over layers of (A + I) / 2, A the mean over heads        (Abnar & Zuidema 2020)

Integrated gradients are complete: the tokens' shares add up to f(x) - f(x'). The integral is taken at Gauss-Legendre
points, and `gap` says what is missing. The baseline matters: behind an RMS norm the zero vector is a point where f
jumps (a norm does not see how long a vector is), so the default is the mean token vector. Rollout sees neither values
nor feed-forward layers, and has no sign.
"""

# L tokens, D embedding, K points on the path

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.model.base import CausalLM
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.encoder import Encoder
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene, observe

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
    """BC or BV: what is explained; a classifier's logits, or those of the token after the last.

    Raises DataError for a model that has neither.
    """
    if isinstance(model, DecoderClassifier):
        return model(tokens_BL)
    if isinstance(model, Encoder) and model.classifier is not None:
        return model.classes(tokens_BL)
    if isinstance(model, CausalLM):
        return model.unembed(model.hidden(tokens_BL)[:, -1])
    raise DataError(
        f"a {model.config.model_type} of kind {model.config.kind!r} has no class and no next token to explain here; "
        "language models and text classifiers have (for images: `look image_attention`)."
    )


def gradient_x_input(model: Any, tokens_L: Sequence[int], target: int) -> Saliency:
    """x · ∂f/∂x for every token. f is output number `target`."""
    site, tokens_1L = _embed_site(model), torch.tensor([list(tokens_L)], device=model.device)
    with torch.enable_grad(), observe(model, site) as seen:
        value = outputs(model, tokens_1L)[0, target]
    x_LD = seen[site]
    if not x_LD.requires_grad:  # frozen weights: start the graph at the vectors
        return _at_points(model, tokens_1L, target, x_LD.detach(), torch.zeros_like(x_LD), np.ones(1), np.ones(1))
    (gradient,) = torch.autograd.grad(value, x_LD)
    return Saliency((x_LD * gradient)[0].sum(-1).detach().double().cpu(), float(value.detach()))


def integrated_gradients(
    model: Any, tokens_L: Sequence[int], target: int, *, baseline_D: Tensor | None = None, points: int = 64
) -> Saliency:
    """The tokens' shares of f(x) - f(x'). baseline_D: the vector of x' at every token; default: their mean."""
    if points < 1:
        raise DataError(f"points = {points}; at least one point of the path is needed.")
    site, tokens_1L = _embed_site(model), torch.tensor([list(tokens_L)], device=model.device)
    with torch.no_grad(), observe(model, site) as seen:
        value = float(outputs(model, tokens_1L)[0, target])
    x_1LD = seen[site].detach()
    start_1LD = (mean_vector(model) if baseline_D is None else baseline_D).to(x_1LD).expand_as(x_1LD)
    with torch.no_grad(), intervene(model, {site: lambda _: start_1LD}):
        baseline = float(outputs(model, tokens_1L)[0, target])
    nodes_K, weights_K = np.polynomial.legendre.leggauss(points)
    found = _at_points(model, tokens_1L, target, x_1LD, start_1LD, (nodes_K + 1) / 2, weights_K / 2)
    gap = value - baseline - float(found.scores_L.sum())
    return Saliency(found.scores_L, value, baseline, gap)


def _at_points(
    model: Any, tokens_1L: Tensor, target: int, x: Tensor, start: Tensor, at: np.ndarray, weights: np.ndarray
) -> Saliency:
    """(x - x') · Σ_k w_k ∂f/∂x at x' + t_k (x - x')."""
    site, total = _embed_site(model), torch.zeros_like(x[0], dtype=torch.float64)
    value = 0.0
    for first in range(0, len(at), AT_ONCE):
        t_K11 = torch.tensor(at[first : first + AT_ONCE], dtype=x.dtype, device=x.device)[:, None, None]
        w_K11 = torch.tensor(weights[first : first + AT_ONCE], device=x.device)[:, None, None]
        points_KLD = (start + t_K11 * (x - start)).requires_grad_()
        put: Callable[[Tensor], Tensor] = lambda _, points=points_KLD: points  # type: ignore[misc]  # noqa: E731
        with torch.enable_grad(), intervene(model, {site: put}):
            values_K = outputs(model, tokens_1L.expand(len(points_KLD), -1))[:, target]
            (gradients,) = torch.autograd.grad(values_K.sum(), points_KLD)
        total += (w_K11 * gradients.double()).sum(0)
        value = float(values_K[-1].detach())
    return Saliency(((x - start)[0].double() * total).sum(-1).cpu(), value)


@torch.no_grad()
def rollout(model: Any, tokens_L: Sequence[int]) -> Tensor:
    """LL: how much of each token's last state flows from each input token, rows sum to 1. Raises DataError where there
    is no attention of a token to tokens."""
    patterns = [site for site in model.sites if site.endswith(".attn.probs")]
    if not patterns:
        raise DataError(f"a {model.config.model_type} has no attention to roll out; take a gradient method.")
    with observe(model, patterns) as seen:
        outputs(model, torch.tensor([list(tokens_L)], device=model.device))
    L = len(tokens_L)
    flow_LL = torch.eye(L, dtype=torch.float64)
    for site in patterns:
        mixed_LL = seen[site][0].double().mean(0).cpu()[:, -L:] + torch.eye(L, dtype=torch.float64)
        flow_LL = mixed_LL / mixed_LL.sum(-1, keepdim=True) @ flow_LL
    return flow_LL


def mean_vector(model: Any) -> Tensor:
    """D: the mean of all token vectors, scaled as the family scales them."""
    mean_D: Tensor = model.embedding.weight.detach().float().mean(0)
    return mean_D * getattr(model.config, "embed_scale", 1.0)


def token_vector(lm: LanguageModel, number: int) -> Tensor:
    """D: one token's vector, the same way."""
    vector_D: Tensor = lm.model.embedding.weight.detach()[number].float()
    return vector_D * getattr(lm.config, "embed_scale", 1.0)


def _embed_site(model: Any) -> str:
    return "embed" if "embed" in model.sites else "decoder.embed"

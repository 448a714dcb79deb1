"""Ways to keep a model from learning its examples by heart, each a small thing hung on the run.

    l2, weight decay    train/optim.py             w ← w - ηλw: every weight shrinks by a share of itself
    l1                  after each step            w ← sign(w) · max(|w| - ηλ, 0): all shrink by the same amount
    dropout             the model's config         activations are left out at random
    gradient noise      before each step           g ← g + N(0, σ_t²), σ_t² = η / (1 + t)^0.55
    NEFTune             at the site `embed`        x ← x + U(-1, 1) · α / √(L·D), in training only
    augmentation        data/augment.py            other texts in every epoch
    early stopping      train/fit.py               the best weights so far are kept

L1 is applied as its proximal step (soft thresholding; Parikh & Boyd 2014, section 6.5.2), beside the optimizer, as
AdamW does with L2. Its subgradient, λ·sign(w) added to the gradient, has two faults here: weights swing around 0 and
never are 0, and Adam divides it by the gradient's size, so that weights that hardly matter are penalised most. With
plain gradient descent the proximal step ends at the minimum of loss + λ·Σ|w|. With Adam, whose own steps have the
size η, a weight stays 0 while its gradient's mean is less than λ times its root mean square.
"""

# B batch, L length, D hidden size

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.model.taps import intervene, sites
from bildung.train.shards import local, number_of_part

NOISE_DECAY = 0.55  # γ of Neelakantan et al. 2015


def add_l1(optimizer: torch.optim.Optimizer, strength: float) -> None:
    """L1 penalty of `strength` on all matrices: a proximal step after each optimizer step. Vectors are left alone.

    Raises SettingsError for weights that are not float32, in which η·λ would round away.
    """
    for group in optimizer.param_groups:
        if any(parameter.dtype != torch.float32 for parameter in group["params"]):
            raise SettingsError("l1 needs weights in float32: its small steps round away. Set weights to fp32.")

    @torch.no_grad()
    def shrink(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.ndim >= 2:
                    soft_threshold(parameter, group["lr"] * strength)

    optimizer.register_step_post_hook(shrink)


def soft_threshold(weight: Tensor, by: float) -> None:
    """weight ← sign(weight) · max(|weight| - by, 0), in place: what was nearer to 0 than `by` is 0."""
    weight.copy_(weight.sign() * (weight.abs() - by).clamp(min=0))


def add_gradient_noise(optimizer: torch.optim.Optimizer, eta: float, seed: int) -> None:
    """Normal noise of variance eta / (1 + t)^0.55 on every gradient before step t = 0, 1, ... (Neelakantan et al. 2015,
    arXiv 1511.06807, eq. 1; they use eta 0.01, 0.3 and 1). It comes after clipping, so it is not clipped.

    A function of (seed, t): t is what fit writes into the groups as `taken`. Ranks that hold the same numbers add the
    same noise, those that hold other parts of a tensor different ones.
    """

    @torch.no_grad()
    def disturb(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group_number, group in enumerate(optimizer.param_groups):
            deviation = math.sqrt(eta / (1 + group["taken"]) ** NOISE_DECAY)
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                grad, part = local(parameter.grad), number_of_part(parameter.grad)
                generator = _generator(grad.device, seed, group["taken"], group_number, number, part)
                noise = torch.randn(grad.shape, generator=generator, device=grad.device, dtype=grad.dtype)
                grad.add_(noise, alpha=deviation)

    optimizer.register_step_pre_hook(disturb)


def _generator(device: torch.device, *numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator(device).manual_seed(seed)


@contextlib.contextmanager
def neftune(model: nn.Module, alpha: float) -> Iterator[None]:
    """Uniform noise of size alpha / √(L·D) on the token vectors while the model trains (Jain et al. 2023, arXiv
    2310.05914, algorithm 1; they use alpha 5, 10 and 15).

    L is the row's length, padding and neighbours in a packed row included (as in trl; the paper's code counts real
    tokens). Chance is fit's, a function of (seed, step). Raises SettingsError for a model without token vectors.
    """
    places = [site for site in sites(model) if site == "embed" or site.endswith(".embed")]
    if not places:
        raise SettingsError("neftune is noise on token vectors, and this model has no site `embed`.")

    def disturb(x_BLD: Tensor) -> Tensor | None:
        if not model.training:
            return None
        reach = alpha / math.sqrt(x_BLD.shape[-2] * x_BLD.shape[-1])
        return x_BLD + torch.empty_like(x_BLD).uniform_(-reach, reach)

    tap: Callable[[Tensor], Tensor | None] = disturb
    with intervene(model, dict.fromkeys(places, tap)):
        yield

"""Small models that read a label off a frozen activation, and the two questions to ask before believing one.

    linear   y = W h + b            or, with a rank, y = W2 W1 h + b
    mlp      y = W2 relu(W1 h + b1) + b2

A probe that is right may have found the property in h, or learned the task itself. Hewitt & Liang 2019 (arXiv
1909.03368) therefore train the same probe on a control task, whose labels are drawn at random for each word type, so
that they can only be memorised:     selectivity = accuracy - accuracy on the control task.

Voita & Titov 2020 (arXiv 2003.12298) ask how many bits the labels cost someone who has h: in the online code each
stretch of the data is coded by a probe trained on all before it. A property that is easy to read off costs few.
"""

# N examples, F numbers of one activation, C classes

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.core.settings import settings as settings_class

Kind = Literal["linear", "mlp"]
LEAST = 1e-3  # what the loss must fall by to count as better (the published code's threshold)
# Voita & Titov's stretches end at these shares of the data.
PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
LogProbs = Callable[[Tensor], Tensor]  # activations NF -> log p NC


@settings_class
class Options:
    """How probes are made and trained."""

    rank: int | None = None  # linear: of the matrix; default: full
    hidden: int = 128  # mlp: units of the hidden layer
    epochs: int = 40  # passes over the training part at most
    batch_size: int = 128  # examples of a step
    learning_rate: float = 1e-3  # of Adam; halved after an epoch without a better loss
    weight_decay: float = 0.0  # L2 on the weights
    patience: int = 5  # stop after so many epochs without a better loss on the development part, as the published code

    def check(self) -> None:
        """Raises SettingsError for a number out of range."""
        for name in ("rank", "hidden", "epochs", "batch_size", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingsError(f"{name} = {value} was given; it must be at least 1.")
        if not self.learning_rate > 0 or self.weight_decay < 0:
            raise SettingsError("learning_rate is above 0 and weight_decay at least 0.")


class Probe(nn.Module):
    """Activations NF -> scores NC (of regression: N1). They are brought to mean 0 and variance 1 first: some features
    of a residual stream are hundreds of times larger than the others, and Adam's one step size is for all."""

    mean_F: Tensor
    scale_F: Tensor

    def __init__(self, kind: Kind, options: Options, x_NF: Tensor, outputs: int):
        super().__init__()
        width = x_NF.shape[1]
        self.register_buffer("mean_F", x_NF.mean(0))
        spread_F = x_NF.std(0, correction=0)
        self.register_buffer("scale_F", torch.where(spread_F > 1e-6, spread_F, 1.0))
        layers: list[nn.Module] = []
        if kind == "mlp":
            layers, width = [nn.Linear(width, options.hidden), nn.ReLU()], options.hidden
        elif options.rank is not None:
            layers, width = [nn.Linear(width, options.rank, bias=False)], options.rank
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, x_NF: Tensor) -> Tensor:
        scores: Tensor = self.layers((x_NF - self.mean_F) / self.scale_F)
        return scores


def train_probe(
    kind: Kind,
    options: Options,
    train: tuple[Tensor, Tensor],
    dev: tuple[Tensor, Tensor],
    classes: int | None,
    seed: int,
    known: Tensor | None = None,
) -> Probe:
    """A probe trained on (activations NF, labels N) where these are; of all epochs, the best on the development part.

    classes: None is regression, of labels of mean 0 and variance 1. Cross entropy or squared error, Adam; the seed
    decides the first weights and the order. known: activations whose mean and variance are made 0 and 1, if not those
    trained on (the online code's first probes see a few labels, but sender and receiver both have all activations).
    """
    x_NF, y_N = train[0].float(), train[1]
    dev_x, dev_y = dev[0].float(), dev[1]
    loss_of = _squared_error if classes is None else F.cross_entropy
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(kind, options, (x_NF if known is None else known).cpu(), classes or 1).to(x_NF.device)
    decay = options.weight_decay
    optimizer = torch.optim.Adam(probe.parameters(), options.learning_rate, weight_decay=decay, fused=True)
    x_NF, dev_x = ((part - probe.mean_F) / probe.scale_F for part in (x_NF, dev_x))
    best, kept, waited = math.inf, copy.deepcopy(probe.layers.state_dict()), 0
    for _ in range(options.epochs):
        order = torch.randperm(len(x_NF), generator=generator).to(x_NF.device)
        for rows in order.split(options.batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss_of(probe.layers(x_NF[rows]), y_N[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(loss_of(probe.layers(dev_x), dev_y))
        if loss < best - LEAST:
            best, kept, waited = loss, copy.deepcopy(probe.layers.state_dict()), 0
            continue
        waited += 1
        for group in optimizer.param_groups:
            group["lr"] /= 2
        if waited == options.patience:
            break
    probe.layers.load_state_dict(kept)
    return probe.eval()


def _squared_error(scores_N1: Tensor, y_N: Tensor) -> Tensor:
    return F.mse_loss(scores_N1[:, 0], y_N)


@torch.no_grad()
def score(probe: nn.Module, x_NF: Tensor, y_N: Tensor, classes: int | None) -> float:
    """Accuracy; of regression R² = 1 - squared error / variance, which is 0 for always saying the mean."""
    scores_NC = probe(x_NF.float())
    if classes is not None:
        return float((scores_NC.argmax(-1) == y_N).float().mean())
    return float(1 - (scores_NC[:, 0] - y_N).square().mean() / y_N.var(correction=0).clamp_min(1e-12))


def control_labels(types: Sequence[str], labels_N: Tensor, seed: int) -> Tensor:
    """The control task's labels: one for every type, the same wherever it stands, drawn from the labels of all tokens
    (their empirical distribution, as for part-of-speech tags in the paper)."""
    generator = torch.Generator().manual_seed(seed)
    names = sorted(set(types))
    drawn = labels_N[torch.randint(len(labels_N), (len(names),), generator=generator)]
    number = {name: i for i, name in enumerate(names)}
    return drawn[torch.tensor([number[name] for name in types])]


def online_code(
    fit: Callable[[Tensor, Tensor], LogProbs],
    x_NF: Tensor,
    y_N: Tensor,
    classes: int,
    portions: Sequence[float] = PORTIONS,
) -> float:
    """Bits of the labels y given x, eq. 3 of Voita & Titov: the first stretch costs log2 C a label, each other what the
    probe that `fit` makes of all before it says. (A uniform code costs N log2 C.)"""
    ends = sorted({max(1, round(share * len(y_N))) for share in portions})
    bits = ends[0] * math.log2(classes)
    for start, end in itertools.pairwise(ends):
        log_probs_NC = fit(x_NF[:start], y_N[:start])(x_NF[start:end])
        bits -= float(log_probs_NC.gather(1, y_N[start:end, None]).sum()) / math.log(2)
    return bits

"""A sweep of probes: every site, every kind of probe, the task and its control task, several seeds.

A seed draws the split of the texts (8 : 1 : 1 for training, development, test), the control task's labels, and the
probes' first weights and order. The standard error over seeds covers all three. Probe and control probe see the same
activations with the same options and the same amount of data; only the labels differ.
"""

# P kinds of probe, S sites, R seeds; N units, F numbers of one activation

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.look.probing.probes import Kind, LogProbs, Options, control_labels, online_code, score, train_probe

PARTS = (0.8, 0.1, 0.1)


@dataclass
class Sweep:
    """Scores are accuracies, or R² where classes is None; over the test parts. Bits are of the training part's labels,
    each; None where they were not asked for."""

    sites: list[str]
    kinds: list[Kind]
    classes: list[str] | None
    score_PSR: Tensor
    control_PSR: Tensor
    majority: float  # score of always saying the most frequent class (regression: the mean)
    by_type: float  # score of saying for each type what it mostly was in training, else the majority: no model needed
    bits_PSR: Tensor | None = None
    control_bits_PSR: Tensor | None = None
    units: tuple[int, int, int] = (0, 0, 0)  # of the first seed's three parts

    @property
    def selectivity_PSR(self) -> Tensor:
        """Score minus the score on the control task."""
        return self.score_PSR - self.control_PSR

    @property
    def uniform_bits(self) -> float:
        """Of one label when nothing is known."""
        return math.log2(len(self.classes)) if self.classes else math.nan


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the seeds (the last dimension) and its standard error, NaN for one seed."""
    R = values.shape[-1]
    error = values.std(-1, correction=1) / math.sqrt(R) if R > 1 else torch.full(values.shape[:-1], math.nan)
    return values.mean(-1), error


def sweep(
    vectors: Mapping[str, Tensor],
    labels: Sequence[str | float],
    types: Sequence[str],
    group: Sequence[int],
    *,
    kinds: Sequence[Kind] = ("linear", "mlp"),
    options: Options | None = None,
    seeds: int = 3,
    seed: int = 0,
    bits: bool = False,
    device: torch.device | str = "cpu",
    advance: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Train and test them all. vectors: {site: NF}; types: the word of each unit; group: the text it stands in, which
    is never cut by the split. Numbers as labels make it regression. Raises DataError for too few texts or classes."""
    options = options or Options()
    y_N, classes = as_targets(labels)
    if bits and classes is None:
        raise DataError("description length is of classes, and the labels are numbers; leave out mdl.")
    groups = len(set(group))
    if groups < 10:
        raise DataError(f"{groups} texts were given; at least 10 are needed to set some aside for tests.")
    count = len(classes) if classes else None
    shape = (len(kinds), len(vectors), seeds)
    results = torch.full((2, *shape), math.nan), torch.full((2, *shape), math.nan)
    trivial, sizes = [], (0, 0, 0)
    for r in range(seeds):
        parts = [torch.tensor(part) for part in split(group, seed + r)]
        tasks = [y_N, control_labels(types, y_N, seed + r)]
        trivial.append(_baselines(y_N, types, parts, classes))
        sizes = sizes if r else tuple(map(len, parts))  # type: ignore[assignment]
        for s, (site, x_NF) in enumerate(vectors.items()):
            x = [x_NF[part].to(device).float() for part in parts]
            for p, kind in enumerate(kinds):
                for t, task in enumerate(tasks):
                    y = [task[part].to(device) for part in parts]
                    probe = train_probe(kind, options, (x[0], y[0]), (x[1], y[1]), count, seed + r)
                    results[0][t, p, s, r] = score(probe, x[2], y[2], count)
                    if bits and count is not None:
                        fit = _fitter(kind, options, x[0], (x[1], y[1]), count, seed + r)
                        results[1][t, p, s, r] = online_code(fit, x[0], y[0], count) / len(y[0])
                advance(site)
    scores, code = results
    majority, by_type = torch.tensor(trivial).mean(0).tolist()
    return Sweep(
        list(vectors), list(kinds), classes, scores[0], scores[1], majority, by_type,
        code[0] if bits else None, code[1] if bits else None, sizes,
    )  # fmt: skip


def as_targets(labels: Sequence[str | float]) -> tuple[Tensor, list[str] | None]:
    """(numbers of classes, their names), or (labels of mean 0 and variance 1, None) of numbers. Raises DataError."""
    if all(isinstance(label, float) for label in labels):
        y_N = torch.tensor(labels, dtype=torch.float32)
        if not y_N.isfinite().all() or float(y_N.std(correction=0)) == 0:
            raise DataError("the labels are not finite numbers, or all are the same; there is nothing to predict.")
        return (y_N - y_N.mean()) / y_N.std(correction=0), None
    names = sorted({str(label) for label in labels})
    if len(names) < 2:
        raise DataError(f"the only label is {names[0]!r}; at least two are needed.")
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[str(label)] for label in labels]), names


def split(group: Sequence[int], seed: int) -> list[list[int]]:
    """Units of the training, development and test parts, text by text in a random order."""
    members: dict[int, list[int]] = {}
    for unit, its in enumerate(group):
        members.setdefault(its, []).append(unit)
    names = list(members)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    first, second = round(PARTS[0] * len(names)), round((PARTS[0] + PARTS[1]) * len(names))
    return [
        [unit for place in order[start:end] for unit in members[names[place]]]
        for start, end in ((0, first), (first, second), (second, len(names)))
    ]


def _fitter(
    kind: Kind, options: Options, known: Tensor, dev: tuple[Tensor, Tensor], classes: int, seed: int
) -> Callable[[Tensor, Tensor], LogProbs]:
    def fit(x_NF: Tensor, y_N: Tensor) -> LogProbs:
        probe = train_probe(kind, options, (x_NF, y_N), dev, classes, seed, known)

        def log_probs(new_NF: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.log_softmax(probe(new_NF), -1)

        return log_probs

    return fit


def _baselines(y_N: Tensor, types: Sequence[str], parts: Sequence[Tensor], classes: object) -> tuple[float, float]:
    """(majority, by type) of one split; of regression the R² of the mean and of each type's mean."""
    train, test = parts[0].tolist(), parts[2].tolist()
    y = y_N.tolist()
    by_type: dict[str, list[float]] = {}
    for unit in train:
        by_type.setdefault(types[unit], []).append(y[unit])
    if classes is None:
        middle = sum(y[unit] for unit in train) / len(train)
        said = [sum(seen) / len(seen) if (seen := by_type.get(types[unit])) else middle for unit in test]
        real = y_N[parts[2]]
        spread = real.var(correction=0).clamp_min(1e-12)
        wrong = [(real - torch.tensor(guess)).square().mean() for guess in ([middle] * len(test), said)]
        return float(1 - wrong[0] / spread), float(1 - wrong[1] / spread)
    most = Counter(y[unit] for unit in train).most_common(1)[0][0]
    mostly = {name: Counter(seen).most_common(1)[0][0] for name, seen in by_type.items()}
    right = sum(y[unit] == mostly.get(types[unit], most) for unit in test)
    return sum(y[unit] == most for unit in test) / len(test), right / len(test)

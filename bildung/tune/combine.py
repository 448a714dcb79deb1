"""A weighted sum of LoRA adapters on one base, as one adapter: exact, by concatenation.

    sum_i w_i s_i B_i A_i  =  [w_1 s_1 B_1  w_2 s_2 B_2 ...] [A_1; A_2; ...]        rank r_1 + r_2 + ...

Averaging the factors themselves, as some do, mixes B_1 with A_2. With weights 1 the adapters are stacked; a negative
weight takes away what an adapter learned (task arithmetic: Ilharco et al. 2023, arXiv 2212.04089). How much two updates
get into each other's way is measured: their cosine over all matrices, 0 for updates that touch different directions.

    bildung tune combine lives/x/base lives/x/both --adapters lives/x/law lives/x/verse --weights 0.7 0.3
"""

from __future__ import annotations

from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import cast

import torch

from bildung.core.errors import AdapterError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.evaluate import card
from bildung.evaluate.card import CardSettings
from bildung.model import adapter_file
from bildung.model.base import Model
from bildung.model.linear import linears
from bildung.model.low_rank import LowRank
from bildung.model.named_adapters import add_adapter
from bildung.model.store import load, write_model


@settings_class
class Settings:
    """Combining adapters."""

    adapters: tuple[Path, ...]  # adapter directories, all on the source
    weights: tuple[float, ...] | None = None  # one each; default: 1, their plain sum
    card: CardSettings | None = None  # measure these tasks before and after


def combine(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Write the weighted sum of adapters on the model `source` as one PEFT adapter directory.

    Raises SettingsError for fewer than two adapters or other than one weight each, AdapterError for an adapter that is
    not plainly low-rank (a DoRA also stretches rows, which does not add up) or does not fit.
    """
    if len(settings.adapters) < 2:
        raise SettingsError(f"{len(settings.adapters)} adapter was given; at least two can be combined.")
    weights = settings.weights or (1.0,) * len(settings.adapters)
    if len(weights) != len(settings.adapters) or not all(map(isfinite, weights)):
        raise SettingsError(f"weights = {weights}; {len(settings.adapters)} adapters need as many finite numbers.")

    def work(job: Job) -> None:
        lm = load(source)
        if settings.card is not None:
            card.before(job, lm, settings.card)
        names = [str(number) for number in range(len(weights))]
        for name, directory, weight in zip(names, settings.adapters, weights, strict=True):
            add_adapter(lm, directory, name)
            _weigh(lm.model, directory, name, weight)
        job.measured |= {
            "rank": max(_ranks(lm.model)),
            "cosine": {
                f"{settings.adapters[int(a)]} with {settings.adapters[int(b)]}": cosine(lm.model, a, b)
                for a, b in combinations(names, 2)
            },
        }
        write_model(lm, job.out)
        if settings.card is not None:
            card.after(job, load(job.out), settings.card)

    for directory in settings.adapters:
        if not (directory / adapter_file.CONFIG).exists():
            raise AdapterError(f"{directory} is no adapter directory (no {adapter_file.CONFIG}).")
    companions = {f"adapter {number}": directory for number, directory in enumerate(settings.adapters, start=1)}
    return perform("tune combine", source, out, settings, work, companions=companions, force=force)


def _weigh(model: Model, directory: Path, name: str, weight: float) -> None:
    for linear in linears(model).values():
        if name in linear.deltas:
            delta = linear.deltas[name]
            if not isinstance(delta, LowRank):
                raise AdapterError(
                    f"{directory} holds a {type(delta).__name__} at {linear.name}; only LoRA adapters add up. Merge it "
                    f"into the base first."
                )
            delta.scaling *= weight


def _ranks(model: Model) -> list[int]:
    low_rank = ([d for d in linear.deltas.values() if isinstance(d, LowRank)] for linear in linears(model).values())
    return [sum(delta.rank for delta in deltas) for deltas in low_rank]


@torch.no_grad()
def cosine(model: Model, first: str, second: str) -> float:
    """<dW_1, dW_2> / (|dW_1| |dW_2|) over all matrices, from the factors: <B A, B' A'> = sum of (Bᵀ B') * (A A'ᵀ)."""

    def product(one: str, other: str) -> float:
        total = 0.0
        for linear in linears(model).values():
            if one in linear.deltas and other in linear.deltas:
                first, second = (cast(LowRank, linear.deltas[name]) for name in (one, other))
                (A, B), (A2, B2) = ([f.float() for f in delta.factors()] for delta in (first, second))
                total += first.scaling * second.scaling * float(((B.t() @ B2) * (A @ A2.t())).sum())
        return total

    size = (product(first, first) * product(second, second)) ** 0.5
    return product(first, second) / size if size else 0.0

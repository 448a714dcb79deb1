"""Elastic weight consolidation: weights that mattered to earlier tasks are held by springs (Kirkpatrick et al. 2017,
arXiv 1612.00796).

    loss = loss of the new task + λ/2 · Σ_i F_i (θ_i - θ*_i)²        eq. 3

θ* is where the earlier task ended, F the diagonal of its Fisher information there (fisher.py), one spring per earlier
task. Online EWC (Schwarz et al. 2018, arXiv 1805.06370, eq. 9) keeps one spring for all: F ← γ F + F_new, at the newest
θ*. Huszár 2018 (arXiv 1712.03847) says why that is the better reading of the mathematics.

λ has no scale of its own: papers use 1 to 10⁷, since F depends on the model and on what counts as an example. Here λ
may be given (`strength`) or is found: some plain steps are made and taken back, and λ is such that where they led the
penalty would be `share` of the whole loss. The record says which λ that was, and the share that the penalty had.

Only what trains is held: of a LoRA its factors. F and θ* lie beside the model in ewc.safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bildung.continual.fisher import diagonal_fisher
from bildung.continual.method import Method, Now
from bildung.continual.tasks import Fisher, Task
from bildung.core.errors import ModelFileError, SettingsError
from bildung.core.settings import settings
from bildung.data.batches import Shuffled
from bildung.model.safetensors_file import read_file, write_file
from bildung.model.store import LanguageModel
from bildung.train.checkpoint import put, trained
from bildung.train.fit import fit
from bildung.train.history import History
from bildung.train.loss import LossSum, Objective
from bildung.train.optim import optimizer_from
from bildung.train.training import Batches

FILE = "ewc.safetensors"
AT_ONCE = 8  # examples of one backward pass; it changes the speed, not the result


@settings
class EwcSettings:
    """Elastic weight consolidation."""

    strength: float | None = None  # λ; default: found from `share`
    share: float = 0.5  # of the whole loss that the penalty would be where plain steps lead
    pilot: int = 20  # so many plain steps, which are taken back
    fisher: Fisher = "true"  # outcomes drawn from the model, those of the data (empirical), or all of them (exact)
    examples: int = 200  # of a task, on which its Fisher information is measured
    online: bool = True  # one spring for all earlier tasks; --ewc.no-online: one for each
    gamma: float = 1.0  # online: what is left of the earlier tasks' Fisher information at each new one

    def __post_init__(self) -> None:
        if self.strength is not None and not (0 <= self.strength < math.inf):
            raise ValueError(f"strength = {self.strength}; it must be at least 0 and finite")
        if not 0 < self.share < 1 or not 0 <= self.gamma <= 1:
            raise ValueError(f"share = {self.share} and gamma = {self.gamma}; they are shares between 0 and 1")
        if self.pilot < 1 or self.examples < 1:
            raise ValueError(f"pilot = {self.pilot} and examples = {self.examples}; both must be at least 1")


@dataclass(frozen=True)
class Spring:
    """What holds the weights where a task left them. Both by parameter name."""

    fisher: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor]

    def energy(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """½ Σ F (θ - θ*)², 0 at the anchor."""
        pulls = [
            (self.fisher[name] * (parameter - self.anchor[name]).square()).sum()
            for name, parameter in parameters.items()
            if name in self.fisher
        ]
        return 0.5 * torch.stack(pulls).sum()


class Held:
    """An objective with its penalty. The penalty is not part of what is measured on held-out data."""

    def __init__(self, own: Objective, springs: Sequence[Spring], strength: float):
        self.own, self.springs, self.strength = own, springs, strength

    def __call__(self, model: Any, batch: Any) -> LossSum:
        """A sum over the batch like the loss, so the penalty counts once for everything that is counted."""
        loss = self.own(model, batch)
        if not torch.is_grad_enabled():
            return loss
        parameters = trained(model)
        penalty = self.strength * torch.stack([spring.energy(parameters) for spring in self.springs]).sum()
        shown = {**loss.metrics, "penalty": penalty.detach() * loss.count}
        return LossSum(loss.total + penalty * loss.count, loss.count, shown)


class Ewc(Method):
    """Springs at the weights that mattered."""

    def __init__(self, given: EwcSettings, rank: int | None = None):
        super().__init__(rank)
        self.given = given
        self.springs: list[Spring] = []

    def prepare(self, now: Now, lm: LanguageModel) -> None:
        """Raises ModelFileError when the earlier tasks left none, or those of other parameters."""
        super().prepare(now, lm)
        self.springs = read_springs(now) if now.number > 1 else []
        names = set(trained(lm.model))
        for spring in self.springs:
            if set(spring.fisher) != names:
                raise ModelFileError(f"{now.source / FILE} is of other parameters than the {len(names)} that train.")

    def objective(self, now: Now, lm: LanguageModel, own: Objective, batch_at: Batches) -> Objective:
        if not self.springs:
            return own
        self.springs = [on_device(spring, lm.model.device) for spring in self.springs]
        strength = self.given.strength
        if strength is None:
            strength = self._find_strength(now, lm, own, batch_at)
        now.job.measured["ewc_strength"] = strength
        return Held(own, self.springs, strength)

    def _find_strength(self, now: Now, lm: LanguageModel, own: Objective, batch_at: Batches) -> float:
        """λ with λ · energy = share / (1 - share) · loss after the pilot."""
        start = {name: parameter.detach().clone() for name, parameter in trained(lm.model).items()}
        optimizer = optimizer_from(lm.model, now.given, None)
        history = fit(
            lm.model,
            batch_at,
            own,
            optimizer,
            steps=self.given.pilot,
            micro_steps=now.given.micro_steps,
            clip=now.given.clip,
            seed=now.given.seed,
            title="pilot of ewc",
        )
        with torch.no_grad():
            energy = sum(float(spring.energy(trained(lm.model))) for spring in self.springs)
        put(lm.model, start)
        losses = [row["loss"] for row in history.rows]
        loss = sum(losses[-5:]) / len(losses[-5:])
        if energy == 0:
            raise SettingsError(
                "the pilot's steps meet no spring: the Fisher information is 0 wherever they lead. Use fisher true "
                "instead of empirical, more examples, or give a strength."
            )
        return self.given.share / (1 - self.given.share) * loss / energy

    def finish(self, now: Now, lm: LanguageModel, task: Task, history: History) -> None:
        """Measures the task's Fisher information where it ended."""
        items = now.kind.encode(lm.tokenizer, task.rows)
        some = Shuffled(items, 1, now.given.seed, list)
        items = [some(n)[0] for n in range(min(self.given.examples, len(items)))]
        batches = (now.kind.collate(items[n : n + AT_ONCE], lm.tokenizer.pad_id) for n in range(0, len(items), AT_ONCE))
        fisher = diagonal_fisher(lm.model, batches, now.kind.outcomes(self.given.fisher, now.given.seed))
        anchor = {name: parameter.detach().clone() for name, parameter in trained(lm.model).items()}
        if self.given.online and self.springs:
            earlier = self.springs[0].fisher
            fisher = {name: self.given.gamma * earlier[name] + one for name, one in fisher.items()}
        kept = [] if self.given.online else self.springs
        write_springs([*kept, Spring(fisher, anchor)], now.job.out)
        if self.springs:
            now.job.measured["ewc_penalty_share"] = penalty_share(history.rows)
        now.job.measured["fisher_examples"] = len(items)
        now.job.measured["fisher_sum"] = sum(float(one.sum()) for one in fisher.values())


def on_device(spring: Spring, device: torch.device) -> Spring:
    """The spring beside the weights it holds."""
    return Spring(*({name: tensor.to(device) for name, tensor in part.items()} for part in vars(spring).values()))


def write_springs(springs: Sequence[Spring], directory: Any) -> None:
    """Into ewc.safetensors: NUMBER.fisher.PARAMETER and NUMBER.anchor.PARAMETER."""
    tensors = {
        f"{number}.{part}.{name}": tensor.cpu().contiguous()
        for number, spring in enumerate(springs, start=1)
        for part, named in vars(spring).items()
        for name, tensor in named.items()
    }
    write_file(tensors, directory / FILE)


def read_springs(now: Now) -> list[Spring]:
    """What `write_springs` wrote beside the model. Raises ModelFileError."""
    if not (now.source / FILE).exists():
        raise ModelFileError(f"{now.source / FILE} is missing: it holds the springs of the tasks before.")
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in read_file(now.source / FILE):
        number, part, name = key.split(".", 2)
        found.setdefault(int(number), {}).setdefault(part, {})[name] = tensor
    return [Spring(**found[number]) for number in sorted(found)]


def penalty_share(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of the whole loss, in the mean over the steps of a log."""
    shares = [row["penalty"] / row["loss"] for row in rows if row.get("penalty") is not None and row["loss"] > 0]
    return sum(shares) / len(shares) if shares else 0.0

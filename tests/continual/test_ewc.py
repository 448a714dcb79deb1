"""Springs: 0 at the anchor, the closed form of linear regression, the strength that is looked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bildung
from bildung.continual.ewc import FILE, EwcSettings, Held, Spring, penalty_share, read_springs
from bildung.continual.method import Now
from bildung.continual.train import Settings, train
from bildung.core.errors import ModelFileError, SettingsError
from bildung.core.operation import Job
from bildung.core.settings import resolve
from bildung.model.safetensors_file import read_file
from bildung.train.checkpoint import trained
from bildung.train.fit import fit
from bildung.train.loss import LossSum


@dataclass(frozen=True)
class Pairs:
    """x_NI and y_N of a linear regression."""

    x_NI: Tensor
    y_N: Tensor
    num_tokens = num_targets = 0

    def to(self, device: Any) -> Pairs:
        return self


class Line(nn.Module):
    """y = θ · x."""

    def __init__(self, theta_I: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta_I.clone())


def squares(model: Line, batch: Pairs) -> LossSum:
    return LossSum(0.5 * (batch.x_NI @ model.theta - batch.y_N).square().sum(), len(batch.y_N))


def task(scale: tuple[float, float], theta: tuple[float, float]) -> tuple[Pairs, Tensor]:
    """Data along the axes, so that the Fisher information, the mean of x xᵀ, is its diagonal."""
    x_NI = torch.diag(torch.tensor(scale)).repeat(2, 1)
    return Pairs(x_NI, x_NI @ torch.tensor(theta)), x_NI.square().mean(0)


def test_linear_regression_has_its_closed_form() -> None:
    """(H_B + λ F_A) θ = H_B θ_B + λ F_A θ_A; with λ = 1 that is the minimum over both tasks' data."""
    (_, fisher_A), (data_B, fisher_B) = task((2.0, 0.5), (1.0, -1.0)), task((0.5, 2.0), (-3.0, 2.0))
    theta_A, theta_B = torch.tensor([1.0, -1.0]), torch.tensor([-3.0, 2.0])
    for strength in (0.3, 1.0, 5.0):
        model = Line(theta_A)
        held = Held(squares, [Spring({"theta": fisher_A}, {"theta": theta_A})], strength)
        fit(model, lambda n: data_B, held, torch.optim.SGD(model.parameters(), 0.17), steps=60)
        expected = (fisher_B * theta_B + strength * fisher_A * theta_A) / (fisher_B + strength * fisher_A)
        torch.testing.assert_close(model.theta.data, expected, atol=2e-3, rtol=1e-3)


def test_the_penalty_is_0_at_the_anchor_and_no_part_of_a_measurement() -> None:
    data, fisher = task((2.0, 0.5), (1.0, -1.0))
    model = Line(torch.tensor([0.5, 2.0]))
    held = Held(squares, [Spring({"theta": fisher}, {"theta": model.theta.detach().clone()})], 7.0)
    at_anchor = held(model, data)
    assert float(at_anchor.metrics["penalty"]) == 0 and torch.equal(at_anchor.total, squares(model, data).total)
    model.theta.data += torch.tensor([1.0, -2.0])
    away = 7.0 * 0.5 * (fisher * torch.tensor([1.0, 4.0])).sum()
    found = held(model, data)
    torch.testing.assert_close(found.total - squares(model, data).total, away * found.count)
    with torch.no_grad():
        assert torch.equal(held(model, data).total, squares(model, data).total)


@pytest.mark.parametrize(("online", "springs"), [(True, 1), pytest.param(False, 3, marks=pytest.mark.slow)])
def test_a_sequence(
    encoder: Path, tasks: Any, given: Callable[..., Settings], tmp_path: Path, online: bool, springs: int
) -> None:
    ewc = {"online": online, "gamma": 0.5, "examples": 20, "pilot": 5, "share": 0.8}
    settings = given(tasks=tasks, method="ewc", steps=12, ewc=ewc)
    record = train(encoder, tmp_path / "out", settings)
    assert len(record.measured["scores"]) == 3
    places = [tmp_path / "out" / name for name in ("1-pets", "2-times", "3-colours")]
    records = [bildung.load(place).record for place in places]
    assert "ewc_strength" not in records[0].measured and records[0].measured["fisher_sum"] > 0
    assert records[1].measured["ewc_strength"] > 0 and 0 < records[1].measured["ewc_penalty_share"] < 1
    kept = {key.split(".")[0] for key, _ in read_file(places[2] / FILE)}
    assert len(kept) == springs
    stored = dict(read_file(places[1] / FILE))
    last = bildung.load(places[1]).model
    newest = "1" if online else "2"
    name = "model.layers.0.mlp.up_proj.base.weight"
    torch.testing.assert_close(stored[f"{newest}.anchor.{name}"], last.get_parameter(name).data, atol=0, rtol=0)
    if online:  # F <- γ F + F_new: what was there stays, by half
        first = dict(read_file(places[0] / FILE))
        assert bool((stored[f"1.fisher.{name}"] >= 0.5 * first[f"1.fisher.{name}"] - 1e-12).all())


@pytest.mark.slow
def test_it_holds_what_plain_training_lets_go(encoder: Path, given: Callable[..., Settings], tmp_path: Path) -> None:
    """A strong spring leaves the weights nearer to where they were."""
    moved = {}
    for strength in (0.0, 1e4):
        ewc = {"strength": strength, "examples": 20, "fisher": "exact"}
        out = tmp_path / f"{strength:g}"
        train(encoder, out, given(method="ewc", steps=15, ewc=ewc))
        before, after = bildung.load(out / "1-pets").model, bildung.load(out / "2-times").model
        spring = read_springs(now_at(out / "1-pets"))[0]
        with torch.no_grad():
            moved[strength] = float(spring.energy(trained(after.requires_grad_(True))))
            assert float(spring.energy(trained(before.requires_grad_(True)))) == 0
    assert 20 * moved[1e4] < moved[0.0]


def now_at(source: Path) -> Now:
    return Now(Job("test", None, source, None), source, None, None, (), 2)  # type: ignore[arg-type]


def test_what_is_refused(encoder: Path, given: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"ewc.safetensors is missing: it holds the springs"):
        read_springs(now_at(encoder))
    for wrong in ({"share": 1.0}, {"gamma": 2}, {"strength": -1}, {"pilot": 0}):
        with pytest.raises(SettingsError):
            resolve(EwcSettings, wrong)


def test_the_share_of_the_penalty_is_that_of_the_log() -> None:
    assert penalty_share([{"loss": 2.0, "penalty": 0.5}, {"loss": 1.0, "penalty": 0.5}]) == pytest.approx(0.375)
    assert penalty_share([{"loss": 2.0}]) == 0

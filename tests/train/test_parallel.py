"""Training on two processes: equal to one, holding less, resumable on another number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bildung.core.errors import SettingsError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.train.optim import optimizer_from
from bildung.train.parallel import Parallel
from bildung.train.sharing import sent
from bildung.train.training import Training
from tests.processes import torchrun
from tests.train import parallel_run

KINDS = ("ddp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process and of two, side by side."""
    out = tmp_path_factory.mktemp("parallel")
    parallel_run.main(out)
    done = torchrun("-m", "tests.train.parallel_run", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("what", ["", "_lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_as_one_process(runs: Path, kind: str, what: str) -> None:
    alone, together = (load_file(runs / f"{name}{what}.safetensors") for name in ("none", kind))
    assert set(alone) == set(together)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=1e-6, rtol=0)
    losses = [json.loads((runs / f"{name}{what}.json").read_text())["losses"] for name in ("none", kind)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == parallel_run.STEPS


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_a_value_head_learns_the_same(runs: Path, kind: str) -> None:
    alone, together = (load_file(runs / f"{name}_values.safetensors") for name in ("none", kind))
    assert alone["attached.norm.weight_D"].abs().max() > 1e-3 and alone["attached.norm.bias_1"].abs() > 1e-3
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=1e-6, rtol=0)


def test_bytes_held_follow_the_textbook(runs: Path) -> None:
    """Exam row 14, in float32: weights 4P, gradients 4P, moments 8P; zero1 halves the moments, zero2 and 3 all."""
    held = {kind: json.loads((runs / f"{kind}.json").read_text()) for kind in ("none", *KINDS)}
    alone = held["none"]
    assert alone["weights"] == alone["gradients"] and alone["optimizer"] >= 2 * alone["weights"]
    assert held["ddp"]["weights"] == alone["weights"] and held["ddp"]["optimizer"] == alone["optimizer"]
    assert held["zero1"]["weights"] == alone["weights"]
    for kind in ("zero1", "zero2", "zero3"):
        assert held[kind]["optimizer"] == pytest.approx(alone["optimizer"] / 2, rel=0.1)
    for kind in ("zero2", "zero3"):
        assert held[kind]["gradients"] == pytest.approx(alone["gradients"] / 2, rel=0.1)
        assert held[kind]["weights"] == pytest.approx(alone["weights"] / 2, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_where_two_stopped(runs: Path, kind: str) -> None:
    model, measured = parallel_run.train("none", runs / f"broken_off_{kind}")
    whole = load_file(runs / "none.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), whole[name], atol=1e-6, rtol=0)
    assert len(measured["losses"]) == parallel_run.STEPS


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_two_go_on_where_one_process_stopped(runs: Path, kind: str) -> None:
    alone, resumed = load_file(runs / "none.safetensors"), load_file(runs / f"resumed_{kind}.safetensors")
    for name in alone:
        torch.testing.assert_close(resumed[name], alone[name], atol=1e-6, rtol=0)


def test_each_rank_writes_what_it_holds(runs: Path) -> None:
    """Of the last checkpoint, weights, best weights and two moments: with zero3 half of everything, with zero1 half of
    the moments."""
    sizes = {}
    for kind in ("zero1", "zero3"):
        place = max((runs / f"one_then_{kind}").glob(".checkpoint-0*"))
        sizes[kind] = [(place / f"part-{rank}.safetensors").stat().st_size for rank in range(2)]
    weights = json.loads((runs / "none.json").read_text())["weights"]
    assert sizes["zero3"] == pytest.approx([2 * weights] * 2, rel=0.25)
    assert sizes["zero1"] == pytest.approx([3 * weights, weights], rel=0.25)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_sent_follow_the_textbook(runs: Path, kind: str, micro_batches: int) -> None:
    """2 P, 2 P, 2 P, 3 P, times (N - 1)/N, as the kernel counts them, when what gloo sends too much is taken out: its
    reduce_scatter is an all_reduce inside, its reduce half of one. (NCCL sends what is needed.)"""
    found = json.loads((runs / "traffic.json").read_text())
    for exchange, numbers in {"all_reduce": 1, "all_gather": 0.5, "reduce_scatter": 1, "reduce": 0.75}.items():
        assert found[exchange] == pytest.approx(numbers, abs=0.01)  # sent by a rank per number exchanged
    P, blocks = found["parameters"], found["in_blocks"]
    expected = sent(kind, 2, P, micro_batches=micro_batches)
    too_much = {"zero1": found["reduce"] - 0.5, "zero2": found["reduce_scatter"] - 0.5}
    too_much["zero3"] = too_much["zero2"]
    expected += too_much.get(kind, 0) * P * (1 if kind == "zero1" else micro_batches)
    if kind == "zero3":
        expected -= 0.5 * (P - blocks) * micro_batches  # what is outside of the blocks is gathered once, not twice
    numbers = found[f"{kind} {micro_batches}"] / 4
    assert numbers == pytest.approx(expected, rel=0.03)


def test_what_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(SettingsError, match="torchrun"):
        Parallel("ddp", model, parallel_run.clm)
    with pytest.raises(SettingsError, match="offload needs"):
        Parallel("none", model, parallel_run.clm, offload=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="2 processes were started"):
        Parallel("none", model, parallel_run.clm)
    with pytest.raises(SettingsError, match="nothing would be saved"):
        Parallel("zero3", model, parallel_run.clm, offload=True)


def test_micro_batches_are_dealt_out_among_those_with_batches_of_their_own() -> None:
    parallel = object.__new__(Parallel)
    parallel.rank, parallel.team_size, parallel.copies = 5, 2, 4  # the third team of two
    assert list(parallel.mine(8)) == [2, 6]
    with pytest.raises(SettingsError, match="micro_steps = 6 do not divide among 4 teams of 2 ranks"):
        parallel.mine(6)


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3", "hybrid", "tensor"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "adamw_8bit", "paged_adamw"])
def test_an_optimizer_that_cannot_be_shared_is_refused(kind: str, optimizer: str) -> None:
    model = build(from_dict(parallel_run.KEYS), seed=3)
    given = Training(optimizer=optimizer, parallel=kind)
    whole_state = optimizer == "paged_adamw" and kind != "ddp"
    if whole_state or (optimizer not in ("adamw", "muon") and kind not in ("ddp", "zero1")):
        with pytest.raises(SettingsError, match=f"parallel = '{kind}'"):
            optimizer_from(model, given)
    else:
        optimizer_from(model, given)

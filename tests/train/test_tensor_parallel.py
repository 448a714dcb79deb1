"""Cut matrices on two processes: equal to whole ones, half as large, resumable on one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bildung.core.errors import SettingsError, TrainingError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.int8 import Int8
from bildung.model.linear import Delta
from bildung.model.nf4 import Nf4
from bildung.train import tensor_parallel
from bildung.train.objectives import clm
from bildung.train.parallel import Parallel
from bildung.train.plan import plan
from tests.processes import two_ranks
from tests.train import tensor_run
from tests.train.parallel_run import micro_batch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process and of two, side by side."""
    out = tmp_path_factory.mktemp("tensor")
    tensor_run.main(out)
    two_ranks(tensor_run.main, out)
    return out


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of cases that those of `runs` stand for."""
    out = tmp_path_factory.mktemp("more")
    tensor_run.more(out)
    two_ranks(tensor_run.more, out)
    return out


def measured(runs: Path, name: str) -> dict:
    return json.loads((runs / f"{name}.json").read_text())


@pytest.mark.parametrize("case", [case for case in tensor_run.CASES if case not in ("dropout", *tensor_run.MORE)])
def test_the_same_as_one_process(runs: Path, case: str) -> None:
    """Weights, losses, and the gradient's norm, in which what is cut and what is whole count once. (gpt2 drops out on
    the stream, where ranks must draw the same.)"""
    assert_the_same(runs, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", tensor_run.MORE)
def test_more_cases_are_the_same_as_one_process(more_runs: Path, case: str) -> None:
    assert_the_same(more_runs, case)


def assert_the_same(runs: Path, case: str) -> None:
    alone, together = (load_file(runs / f"{kind} {case}.safetensors") for kind in ("none", "tensor"))
    assert set(alone) == set(together)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=1e-6, rtol=0)
    told, heard = measured(runs, f"tensor {case}"), measured(runs, f"none {case}")
    assert told["loss"] == pytest.approx(heard["loss"], abs=2e-6)
    assert told["grad_norm"] == pytest.approx(heard["grad_norm"], rel=1e-5) and told["in_step"]


@pytest.mark.parametrize("case", tensor_run.WORDS)
def test_a_cut_vocabulary_is_the_vocabulary(runs: Path, case: str) -> None:
    """61 words on two ranks: losses, gradients (of a tied matrix, of both its uses), logits and what is generated."""
    alone, together = (load_file(runs / f"{kind} words {case}.safetensors") for kind in ("none", "tensor"))
    assert set(alone) == set(together) and torch.equal(alone["answers"], together["answers"])
    for name, one in alone.items():
        error = float((together[name] - one).abs().max() / one.abs().max())
        assert error < (0.05 if case == "bfloat16" else 5e-6), f"{name} is off by {error:.1e} of its largest number"


def test_each_rank_drops_out_its_own_between_the_cuts_and_the_ranks_stay_in_step(runs: Path) -> None:
    """Half of attention is left out. Which half cannot be the same as in one process; on the stream it must be."""
    told, heard = measured(runs, "tensor dropout"), measured(runs, "none dropout")
    assert told["in_step"] and told["loss"] != heard["loss"]
    assert told["loss"][0] == pytest.approx(heard["loss"][0], abs=0.05)


def test_chance_is_common_before_and_after_and_each_ranks_own_between() -> None:
    class Team:
        rank = 0

    def drawn(rank: int) -> list[float]:
        chance, linear = tensor_parallel._Chance(Team(), torch.device("cpu")), torch.nn.Linear(1, 1)
        chance.team.rank = rank
        torch.manual_seed(1)
        numbers = [float(torch.rand(()))]
        for _ in range(2):
            chance.leave(linear)
            numbers.append(float(torch.rand(())))
            chance.return_(linear)
            numbers.append(float(torch.rand(())))
        return numbers

    one, other = drawn(0), drawn(1)
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, True, False, True]
    assert len(set(one)) == 5


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox", "int8 lora", "nf4 lora"])
def test_a_rank_holds_what_the_plan_says(runs: Path, case: str) -> None:
    """Half, but norms, positions, one factor of each delta, constants of NF4 and scales of Int8's columns. Of 61 words
    this rank has half a row more than half."""
    alone, together = (measured(runs, f"{kind} {case}")["held"] for kind in ("none", "tensor"))
    model = tensor_run.model_of(case)
    made = plan(model, clm, micro_batch(0), moments=({},))  # what is there when nothing is computed
    claimed, half_a_row = made.parts_on(2, "tensor"), 2 * model.config.hidden_size
    tables = 2 if case == "gpt_neox" else 1
    assert together["weights"] == pytest.approx(claimed["weights"] + tables * half_a_row, abs=1, rel=0)
    assert claimed["weights"] < 0.6 * alone["weights"]
    trained = tables * half_a_row if model.model.embed_tokens.weight.requires_grad else 0
    assert together["gradients"] == pytest.approx(claimed["gradients"] + trained, abs=1, rel=0)
    assert together["optimizer"] == pytest.approx(claimed["optimizer"] + 2 * trained, rel=0.01)


@pytest.mark.parametrize("case", tensor_run.RESUMED)
def test_one_process_goes_on_where_two_stopped(runs: Path, case: str) -> None:
    model, _ = tensor_run.train(case, "none", runs / f"two then one {case}")
    whole = load_file(runs / f"none {case}.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), whole[name], atol=1e-6, rtol=0)


def test_two_go_on_where_one_process_stopped(runs: Path) -> None:
    alone, resumed = load_file(runs / "none llama.safetensors"), load_file(runs / "resumed.safetensors")
    for name in alone:
        torch.testing.assert_close(resumed[name], alone[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [Int8, Nf4])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_quantized_matrices_are_parts_of_the_matrix(method: type, dim: int) -> None:
    whole = method.quantize(torch.randn(48, 256))
    parts = [whole.part(dim, number, 2) for number in range(2)]
    assert torch.equal(torch.cat([part.dense() for part in parts], dim), whole.dense())
    names = [name for name, _ in whole.named_buffers()]
    joined = parts[1].joined({name: [getattr(part, name) for part in parts] for name in names}, dim)
    for name in names:
        assert torch.equal(getattr(joined, name), getattr(whole, name))


def test_a_block_of_nf4_is_not_cut() -> None:
    with pytest.raises(SettingsError, match="48 numbers lie side by side"):
        Nf4.quantize(torch.randn(4, 96)).part(1, 0, 2)


def test_what_does_not_divide_or_cannot_be_cut() -> None:
    three = {**tensor_run.LLAMA, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 42}
    with pytest.raises(SettingsError, match=r"6 attention heads, 3 key-value heads.*among 2 ranks\. Possible: 3\."):
        tensor_parallel._check(build(from_dict(three)), 2)
    alibi = {"model_type": "bildung", "positions": "alibi", "vocab_size": 61, "hidden_size": 8}
    alibi |= {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    with pytest.raises(TrainingError, match="a bias on the scores"):
        tensor_parallel._check(build(from_dict(alibi)), 2)
    bert = {**tensor_run.SIZES, "model_type": "bert"}
    with pytest.raises(SettingsError, match="decoder-only"):
        tensor_parallel._check(build(from_dict(bert)), 2)


def test_a_delta_of_another_kind_is_named() -> None:
    class Strange(Delta):
        pass

    linear = build(from_dict(tensor_run.LLAMA)).model.layers[0].mlp.up_proj
    linear.deltas["x"] = Strange()
    with pytest.raises(TrainingError, match="up carries a Strange"):
        tensor_parallel.cut_linear("up", linear, 0, None)


def test_teams_must_divide_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SettingsError, match="tensor_ranks = 3 of 4 ranks"):
        Parallel("tensor", model, None, tensor_ranks=3)
    with pytest.raises(SettingsError, match="needs parallel = tensor"):
        Parallel("ddp", model, None, tensor_ranks=2)

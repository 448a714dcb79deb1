"""A budget for forgetting over a sequence: what earlier tasks lost ends a task's training, or brings more old rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.continual.train import Settings, train
from bildung.core.errors import SettingsError
from bildung.core.record import Record, read_record
from bildung.train import fit as fit_module
from bildung.train.checkpoint import trained
from bildung.tune.forgetting import Budget
from bildung.tune.gauges import TEXTS
from bildung.tune.trunk import fixed_batches, speaking, text_loss


@pytest.fixture(autouse=True)
def any_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets that are never reached are of use in these tests alone."""
    monkeypatch.setattr("bildung.tune.forgetting.MOST", math.inf)


FREE = {"forget_budget": 1e9, "forget_every": 2}


def looked_at(record: Record, task: str = "times") -> dict[str, Any]:
    found: dict[str, Any] = record.measured["forget_budget"][task]
    return found


def state(place: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = bildung.load(place).model.state_dict()
    return tensors


def accuracy(record: Record, after: int, task: str) -> float:
    return float(record.measured["scores"][after][task]["score"])


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("plain", {}),
        pytest.param("plain", {"rank": 4, "learning_rate": 2e-2}, marks=pytest.mark.slow),
        pytest.param("ewc", {"ewc": {"examples": 8, "pilot": 2, "share": 0.01}}, marks=pytest.mark.slow),
        pytest.param("lwf", {"lwf": {"strength": 0.01}}, marks=pytest.mark.slow),
        pytest.param("orthogonal_lora", {"learning_rate": 2e-2}, marks=pytest.mark.slow),
    ],
)
def test_a_task_ends_within_it_and_the_matrix_is_of_the_weights_kept(
    method: str,
    more: dict[str, Any],
    encoder: Path,
    given: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = {"heads": "shared", "steps": 14, "method": method, "schedule": "constant", **more}
    seen: dict[int, dict[str, torch.Tensor]] = {}
    keep = Budget._keep

    def noted(self: Budget, step: int, lost: float) -> None:
        keep(self, step, lost)
        seen[step] = {name: tensor.detach().clone() for name, tensor in trained(self.lm.model).items()}

    with monkeypatch.context() as patch:
        patch.setattr(Budget, "_keep", noted)
        free = train(encoder, tmp_path / "free", given(**common, **FREE))
    looks = looked_at(free)["looks"]
    then = accuracy(free, 0, "pets")
    assert looks[-1] == [14, pytest.approx((then - accuracy(free, 1, "pets")) / then)] and looks[-1][1] > 0.3
    assert "pets" not in free.measured["forget_budget"]  # before the first task there is nothing to lose
    place = next(place for place, (_, lost) in enumerate(looks) if lost > 0.05)
    budget = max([0.0, *(lost for _, lost in looks[:place])])
    record = train(encoder, tmp_path / "held", given(**common, forget_budget=budget, forget_every=2))
    measured = looked_at(record)
    assert measured["stopped_after"] == looks[place][0] and measured["measured_on"] == "the earlier tasks"
    assert measured["kept_step"] == (looks[place - 1][0] if place else 0) and measured["lost"] <= budget
    lost = (then - accuracy(record, 1, "pets")) / then
    assert lost == pytest.approx(measured["lost"])  # of the weights kept
    assert any(note.startswith(f"times: stopped after step {looks[place][0]}") for note in record.notes)
    kept, expected = state(tmp_path / "held" / "2-times"), seen[measured["kept_step"]]
    same = [torch.equal(tensor, kept[name]) for name, tensor in expected.items() if name in kept]
    assert (all(same) and len(same) == len(expected)) or method == "orthogonal_lora"  # which is merged


@pytest.mark.slow
def test_rehearsal_is_raised_first(encoder: Path, given: Callable[..., Settings], tmp_path: Path, capsys: Any) -> None:
    """Beyond the budget more and more batches are of old rows alone, which keep the first task."""
    common = {"heads": "shared", "steps": 40, "method": "rehearsal", "schedule": "constant", "forget_every": 4}
    common |= {"rehearsal": {"share": 0.02, "memory": 60}}
    free = train(encoder, tmp_path / "free", given(**common, forget_budget=1e9))
    record = train(encoder, tmp_path / "held", given(**common, forget_budget=0.2))
    measured = looked_at(record)
    assert measured["rehearsal"] and measured["rehearsal"][0][1] == 0.1 and measured["lost"] <= 0.2
    assert accuracy(record, 1, "pets") > accuracy(free, 1, "pets")
    assert "from here on 10% of the batches are of earlier tasks" in capsys.readouterr().err


@pytest.mark.slow
def test_progressive_networks_never_meet_it(encoder: Path, given: Callable[..., Settings], tmp_path: Path) -> None:
    """Nothing is lost at any look, though weight decay moves the head's other rows between two of them."""
    more = {"progressive": {"width": 12, "lateral": 8}, "weight_decay": 50.0, "steps": 6}
    record = train(encoder, tmp_path / "out", given(method="progressive", **more, forget_budget=0.0, forget_every=2))
    measured = looked_at(record)
    assert measured["looks"] == [[2, 0.0], [4, 0.0], [6, 0.0]] and measured["stopped_after"] is None


@pytest.mark.slow
def test_what_the_source_knew_counts_from_the_first_task_on(
    tiny_lm_directory: Path, given: Callable[..., Settings], tmp_path: Path
) -> None:
    """A decoder's layers below the language head of the model that the sequence began with."""
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"text": "The capital of France is Paris. " * 4}) + "\n")
    common = {"learn": "labelled", "steps": 4, "forget_data": str(general), "learning_rate": 1e-3}
    record = train(tiny_lm_directory, tmp_path / "free", given(**common, **FREE))
    found = [looked_at(record, task) for task in ("pets", "times")]
    assert [one["measured_on"] for one in found] == [str(general), f"the earlier tasks and {general}"]
    assert found[0]["at_start"] == 0 and found[1]["at_start"] == pytest.approx(max(0.0, found[0]["lost"]), abs=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "free" / "2-times" / "metrics.jsonl").read_text().splitlines()]
    parts = [tuple(row[f"forgetting{one}"] for one in ("_tasks", "_texts", "")) for row in rows if "forgetting" in row]
    batches = fixed_batches(bildung.load(tiny_lm_directory), str(general), TEXTS, 256)
    last = speaking(bildung.load(tmp_path / "free" / "2-times"), tiny_lm_directory)
    was, now = (
        fit_module.mean_loss(one.model, text_loss, batches)["loss"] for one in (bildung.load(tiny_lm_directory), last)
    )
    assert parts[-1][1] == pytest.approx((now - was) / was, abs=1e-5) and abs(parts[-1][1]) > 1e-3
    assert len(parts) == 2 and all(lost == max(tasks, texts) for tasks, texts, lost in parts)


@pytest.mark.slow
def test_a_killed_sequence_decides_as_the_one_that_was_not(
    encoder: Path, given: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"heads": "shared", "steps": 20, "method": "rehearsal", "forget_budget": 0.1, "forget_every": 2}
    more |= {"rehearsal": {"share": 0.02, "memory": 60}, "checkpoint_every": 1, "async_checkpoints": False}
    whole = train(encoder, tmp_path / "whole", given(**more))
    log, done = fit_module.Log.add, []

    def killed(self: Any, row: dict[str, Any]) -> None:
        log(self, row)
        done.append(row["step"])
        if len(done) == 28:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit_module.Log, "add", killed)
        train(encoder, tmp_path / "out", given(**more))
    record = train(encoder, tmp_path / "out", given(**more))
    assert record.measured["forget_budget"] == whole.measured["forget_budget"]
    assert record.measured["scores"] == whole.measured["scores"]
    kept, expected = state(tmp_path / "out" / "2-times"), state(tmp_path / "whole" / "2-times")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"forget_data": "x"}, "forget_data does nothing without forget_budget"),
        ({"forget_budget": 0.1, "rehearse": "x"}, "a sequence rehearses rows of its own earlier tasks"),
        ({"forget_budget": -1.0}, "must be at least 0"),
    ],
)
def test_what_is_refused(
    encoder: Path, given: Callable[..., Settings], tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        train(encoder, tmp_path / "out", given(steps=1, **wrong))


def test_texts_that_no_head_of_the_source_reads_are_refused(
    encoder: Path, given: Callable[..., Settings], tmp_path: Path
) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"text": "the cat sat"}) + "\n")
    with pytest.raises(SettingsError, match="neither continues text nor fills in masked words"):
        train(encoder, tmp_path / "out", given(steps=1, forget_budget=0.1, forget_data=str(general)))


def test_one_lora_learns_all_labelled_tasks_of_an_encoder(
    encoder: Path, given: Callable[..., Settings], tmp_path: Path
) -> None:
    """`--rank`: each task's directory is an adapter of the first model, which goes on where the last one was, with the
    whole head in it; the layers themselves stay as they are."""
    record = train(encoder, tmp_path / "out", given(rank=4, learning_rate=2e-2, steps=20))
    first, second = (bildung.load(tmp_path / "out" / place) for place in ("1-pets", "2-times"))
    assert first.added == second.added == ["deltas"] and second.base == first.base == encoder
    assert all(accuracy(record, row, task) > 0.9 for row, task in enumerate(("pets", "times")))
    own, was = second.model.state_dict(), state(encoder)
    layers = [name for name in was if name.startswith("model.")]
    assert layers and all(torch.equal(own[name], was[name]) for name in layers)
    a, b = (
        {name: delta.lora_A for name, linear in one.model.linears().items() for delta in linear.deltas.values()}
        for one in (first, second)
    )
    assert a and a.keys() == b.keys() and all(".layers." in name for name in a)
    assert all(len(one) == 4 for one in a.values()) and not any(torch.equal(a[name], b[name]) for name in a)
    last = read_record(tmp_path / "out" / "2-times")
    assert last is not None
    deltas = [delta for linear in second.model.linears().values() for delta in linear.deltas.values()]
    count = sum(parameter.numel() for delta in deltas for parameter in delta.parameters())
    heads = sum(p.numel() for name, p in second.model.named_parameters() if name.startswith(("classifier.", "pooler.")))
    assert last.measured["trainable_parameters"] == count + heads
    with pytest.raises(SettingsError, match="another adapter than one of rank 2"):
        train(tmp_path / "out" / "2-times", tmp_path / "no", given(rank=2, steps=1))


@pytest.mark.slow
def test_a_sequence_goes_on_from_an_adapter_with_tasks_of_other_classes(
    encoder: Path, tasks: tuple[str, ...], given: Callable[..., Settings], tmp_path: Path
) -> None:
    """Another head on the same LoRA."""
    record = train(encoder, tmp_path / "out", given(rank=4, learning_rate=2e-2, steps=20))
    more = given(tasks=(tasks[0], tasks[2]), rank=4, learning_rate=1e-9, steps=1)
    on = train(tmp_path / "out" / "2-times", tmp_path / "more", more)
    assert on.measured["scores_before"]["pets"]["score"] == accuracy(record, 1, "pets") > 0.9

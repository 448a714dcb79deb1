"""A budget for forgetting: it stops, keeps what was within it, raises rehearsal first, and survives a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.align import dpo
from bildung.core.errors import SettingsError, TrainingError
from bildung.core.record import read_record
from bildung.data.batches import clm_examples, pad
from bildung.evaluate.card import CardSettings
from bildung.train import fit as fit_module
from bildung.train.objectives import clm
from bildung.tune import classify_words, dylora, intrinsic_dimension, long_lora, lora
from bildung.tune.gauges import OnTexts, lost_on_card
from bildung.tune.rehearsing import Rehearsing
from tests.tune.conftest import GENERAL


@pytest.fixture(autouse=True)
def any_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets that are never reached are of use in these tests alone."""
    monkeypatch.setattr("bildung.tune.forgetting.MOST", math.inf)


@pytest.fixture
def told(given, general):
    """A run that forgets much, by a large learning rate, looked at every two steps."""
    return {
        **given,
        "steps": 12,
        "learning_rate": 3e-3,
        "forget_data": general,
        "forget_every": 2,
        "schedule": "constant",
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def others(told, tmp_path):
    """name -> run(source, out, **more) of the operations that do not learn from conversations."""
    shared = {name: told[name] for name in told if name not in ("data", "max_length", "learning_rate")}
    letters = [chr(97 + number * number % 23) for number in range(600)]
    pairs = [{"prompt": "Name a colour.", "chosen": "Seven, two.", "rejected": "The capital is Paris."}] * 4
    texts = [{"text": word * 3, "label": number % 2} for number, word in enumerate(["sun ", "fog "] * 4)]
    book = dict(data=write(tmp_path / "book.jsonl", [{"text": "".join(letters)}] * 2), length=512, held_out=0)
    pairs_of = dict(data=write(tmp_path / "pairs.jsonl", pairs), max_length=96)
    words = dict(data=write(tmp_path / "texts.jsonl", texts), words=("zzz", "qqq"), template="{text}is")
    operations: dict[str, tuple[Any, dict[str, Any]]] = {
        "dpo": (dpo, {**pairs_of, "rank": 2, "learning_rate": 3e-2}),
        "dpo full": (dpo, {**pairs_of, "full": True, "learning_rate": 3e-3}),
        "long_lora": (long_lora, {**book, "learning_rate": 3e-3}),
        "classify_words": (classify_words, {**words, "learning_rate": 3e-3}),
        "classify_words full": (classify_words, {**words, "method": "full", "learning_rate": 1e-3}),
    }

    def run(name: str, source: Path, out: Path, **more: Any) -> Any:
        module, given = operations[name]
        operation = getattr(module, module.__name__.rpartition(".")[2])
        return operation(source, out, module.Settings(**{**shared, **given, **more}))

    return run


def prose_loss(directory) -> float:
    lm = bildung.load(directory)
    batch = pad(clm_examples(lm.tokenizer, [GENERAL], 256), lm.tokenizer.pad_id)
    return fit_module.mean_loss(lm.model, clm, [batch])["loss"]


@pytest.mark.parametrize(
    "name",
    ["dpo", "long_lora", "classify_words"]
    + [pytest.param(f"{name} full", marks=pytest.mark.slow) for name in ("dpo", "classify_words")],
)
def test_other_operations_end_within_it_too(source, others, tmp_path, name):
    free = others(name, source, tmp_path / "free", forget_budget=1e9).measured["forgetting"]
    looks, start = free["looks"], free["at_start"]
    beyond = next(place for place, (_, lost) in enumerate(looks) if place and lost > max(start, looks[0][1]) + 1e-3)
    budget = max(start, *(lost for _, lost in looks[:beyond])) + 1e-6
    record = others(name, source, tmp_path / "held", forget_budget=budget)
    measured = record.measured["forgetting"]
    assert measured["looks"] == looks[: beyond + 1] and measured["kept_step"] == looks[beyond - 1][0]
    assert record.measured["steps"] == looks[beyond][0] and (start > 0) is (name == "long_lora")
    before = prose_loss(source)
    lost = (prose_loss(tmp_path / "held") - before) / before  # of what was written
    assert lost == pytest.approx(measured["lost"], abs=1e-5) and lost <= budget + 1e-5


def test_a_start_beyond_the_budget_is_given_time(source, others, tmp_path, capsys):
    """Stretched positions cost at once what training brings back, here on the very texts; other texts take more."""
    prose = write(tmp_path / "prose.jsonl", [{"text": GENERAL * 12}] * 2)
    told = dict(data=prose, steps=8, learning_rate=1e-2)
    healed = others("long_lora", source, tmp_path / "healed", **told, forget_budget=20.0)
    measured = healed.measured["forgetting"]
    assert measured["at_start"] > measured["looks"][0][1] > 20 >= measured["lost"]
    assert healed.measured["steps"] == 8 and not any("stopped after" in note for note in healed.notes)
    assert "before the first step" in capsys.readouterr().err
    worse = others("long_lora", source, tmp_path / "worse", forget_budget=0.0)
    measured = worse.measured["forgetting"]
    assert measured["lost"] <= measured["at_start"] < measured["looks"][-1][1] and measured["lost"] > 0
    assert any("the budget was not reached" in note for note in worse.notes)


def test_other_operations_rehearse_what_they_can(source, others, data, tmp_path):
    for name, old in (("classify_words", data), ("long_lora", str(tmp_path / "book.jsonl"))):
        record = others(name, source, tmp_path / name, forget_budget=0.0, rehearse=old, steps=8, warmup=0.0)
        assert [share for _, share in record.measured["forgetting"]["rehearsal"]][:2] == [0.1, 0.25]
    with pytest.raises(SettingsError, match="this training is on pairs"):
        others("dpo", source, tmp_path / "dpo", forget_budget=0.0, rehearse=data)
    with pytest.raises(SettingsError, match="does nothing with method = none"):
        others("classify_words", source, tmp_path / "none", forget_budget=0.0, method="none")
    with pytest.raises(SettingsError, match="needs something to measure"):
        given = intrinsic_dimension.Settings(data=data, forget_budget=0.1)
        intrinsic_dimension.intrinsic_dimension(source, tmp_path / "search", given)


def test_dylora_is_looked_at_with_all_its_ranks(source, told, tmp_path):
    """Whatever rank the step before trained."""
    given = {**told, "rank": 8, "held_out": 1, "forget_budget": 1e9}
    assert dylora.rank_at(dylora.Settings(**given), 1) < 8
    dylora.dylora(source, tmp_path / "short", dylora.Settings(**{**given, "steps": 2}))
    record = dylora.dylora(source, tmp_path / "out", dylora.Settings(**{**given, "steps": 4}))
    before, after = prose_loss(source), prose_loss(tmp_path / "short")
    assert record.measured["forgetting"]["looks"][0] == [2, pytest.approx((after - before) / before, rel=1e-4)]


def test_the_weights_of_the_lowest_held_out_loss_are_held_to_it_too(source, told, tmp_path, logits):
    """They are of a step that nobody looked at."""
    given = {**told, "held_out": 2, "evaluate_every": 1, "patience": 1, "forget_every": 100}
    record = lora.lora(source, tmp_path / "out", lora.Settings(**given, forget_budget=0.0, warmup=0.0))
    measured = record.measured["forgetting"]
    assert measured["kept_step"] == 0 and measured["looks"][-1][0] == record.measured["best_step"]
    assert torch.equal(logits(bildung.load(tmp_path / "out")), logits(bildung.load(source)))
    assert record.measured["held_out_loss_last"] == pytest.approx(record.measured["held_out_loss_first"], abs=1e-5)


def adapter(directory):
    return [p for name, p in sorted(bildung.load(directory).model.state_dict().items()) if ".lora_" in name]


def test_it_stops_and_keeps_the_weights_within_the_budget(source, told, tmp_path):
    free = lora.lora(source, tmp_path / "free", lora.Settings(**told, forget_budget=1e9))
    looks = free.measured["forgetting"]["looks"]
    assert [step for step, _ in looks] == [2, 4, 6, 8, 10, 12] and free.measured["steps"] == 12
    beyond = next(place for place, (_, lost) in enumerate(looks) if place and lost > looks[0][1] + 1e-3)
    budget = max(lost for _, lost in looks[:beyond]) + 1e-6
    record = lora.lora(source, tmp_path / "held", lora.Settings(**told, forget_budget=budget))
    measured = record.measured["forgetting"]
    assert measured["looks"] == looks[: beyond + 1] and record.measured["steps"] == looks[beyond][0]
    assert measured["kept_step"] == looks[beyond - 1][0] and measured["budget"] == budget
    assert any(f"stopped after step {looks[beyond][0]}" in note for note in record.notes)
    short = {**told, "steps": measured["kept_step"]}
    lora.lora(source, tmp_path / "short", lora.Settings(**short, forget_budget=1e9))
    for kept, expected in zip(adapter(tmp_path / "held"), adapter(tmp_path / "short"), strict=True):
        assert torch.equal(kept, expected)


def test_a_budget_that_nothing_keeps_leaves_the_source(source, told, tmp_path, logits):
    record = lora.lora(source, tmp_path / "out", lora.Settings(**told, forget_budget=0.0, warmup=0.0))
    lost = record.measured["forgetting"]["looks"]
    assert record.measured["forgetting"]["kept_step"] == 0 and len(lost) == 1 and lost[0][1] > 0
    assert torch.equal(logits(bildung.load(tmp_path / "out")), logits(bildung.load(source)))


def test_a_measurement_that_is_no_number_is_beyond_any_budget(source, told, data, tmp_path, logits, monkeypatch):
    """Neither kept, nor helped by rehearsal; of several measurements it counts, whatever the others say."""
    seen = iter([0.0])
    monkeypatch.setattr(OnTexts, "lost", lambda self: next(seen, math.nan))
    given = lora.Settings(**told, forget_budget=1e9, rehearse=data)
    measured = lora.lora(source, tmp_path / "out", given).measured["forgetting"]
    assert measured["stopped_after"] == 2 and measured["kept_step"] == 0 and measured["rehearsal"] == []
    assert torch.equal(logits(bildung.load(tmp_path / "out")), logits(bildung.load(source)))
    with pytest.raises(TrainingError, match=r"is measured before the first step, on .*, and is no number"):
        lora.lora(source, tmp_path / "no", given)


def test_rehearsal_is_raised_before_the_end(source, told, data, tmp_path, capsys):
    given = lora.Settings(**told, forget_budget=0.0, rehearse=data)
    record = lora.lora(source, tmp_path / "out", given)
    measured = record.measured["forgetting"]
    assert [share for _, share in measured["rehearsal"]] == [0.1, 0.25, 0.5] and len(measured["looks"]) == 4
    assert [start for start, _ in measured["rehearsal"]] == [4, 6, 8]
    said = capsys.readouterr().err
    assert f"from here on 25% of the batches are of {data}" in said and "forgetting: stopped after step" in said


def test_a_run_that_ends_while_rehearsal_may_be_raised_is_within_its_budget_too(
    source, told, data, tmp_path, logits, capsys
):
    """Steps that are no multiple of forget_every are looked at after the last of them."""
    given = lora.Settings(**{**told, "steps": 3}, forget_budget=0.0, rehearse=data, warmup=0.0)
    measured = lora.lora(source, tmp_path / "out", given).measured["forgetting"]
    assert [step for step, _ in measured["looks"]] == [2, 3] and measured["looks"][-1][1] > 0
    assert measured["kept_step"] == 0 and measured["stopped_after"] is None
    assert torch.equal(logits(bildung.load(tmp_path / "out")), logits(bildung.load(source)))
    said = capsys.readouterr().err
    assert "no step was within the budget, and nothing was learned" in said
    assert "forgetting: after step 3, the last:" in said and "stopped after" not in said


def test_the_share_of_old_batches():
    class Numbers:
        batches_per_epoch = 5.0

        def __init__(self, kind: str):
            self.kind = kind

        def __call__(self, n: int) -> tuple[str, int]:
            return self.kind, n

    raised = {"rehearsal": torch.zeros(0, 2)}
    mixed = Rehearsing(Numbers("new"), Numbers("old"), raised)
    assert [mixed(n) for n in range(4)] == [("new", n) for n in range(4)]
    raised["rehearsal"] = torch.tensor([[4, 0.25], [12, 0.5]])
    found = [mixed(n) for n in range(20)]
    assert [n for n, (kind, _) in enumerate(found) if kind == "old"] == [7, 11, 13, 15, 17, 19]
    for kind in ("new", "old"):  # each goes through its own without a gap
        numbers = [number for one, number in found if one == kind]
        assert numbers == list(range(len(numbers)))
    assert [mixed(n) for n in (19, 3, 11)] == [found[n] for n in (19, 3, 11)] and mixed.batches_per_epoch == 5.0


def test_a_killed_run_decides_as_the_one_that_was_not(source, told, data, tmp_path, monkeypatch):
    given = lora.Settings(**told, forget_budget=0.0, rehearse=data, checkpoint_every=1, async_checkpoints=False)
    whole = lora.lora(source, tmp_path / "whole", given)
    log = fit_module.Log.add

    def killed(self: Any, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit_module.Log, "add", killed)
        lora.lora(source, tmp_path / "out", given)
    record = lora.lora(source, tmp_path / "out", given)
    assert record.measured["forgetting"] == whole.measured["forgetting"]
    assert all(torch.equal(a, b) for a, b in zip(adapter(tmp_path / "out"), adapter(tmp_path / "whole"), strict=True))


def test_on_the_card(tiny_lm_directory, told, tmp_path):
    del told["forget_data"]
    measured = CardSettings(tasks=("sentiment_mini",), limit=6, sample_prompts=(), dtype="float32")
    given = lora.Settings(**{**told, "steps": 2, "learning_rate": 1e-9}, forget_budget=0.5, card=measured)
    lora.lora(tiny_lm_directory, tmp_path / "out", given)
    record = read_record(tmp_path / "out")
    assert record is not None and record.measured["forgetting"]["measured_on"] == "card"
    assert record.measured["forgetting"]["looks"] == [[2, 0.0]]


def test_what_is_lost_of_a_card():
    """An accuracy that falls by a fifth and a perplexity that rises by a tenth: 15 % in the mean."""

    def made(accuracy: float, perplexity: float) -> dict[str, Any]:
        names = {"a": (accuracy, True), "b": (perplexity, False), "c": (0.0, True)}
        return {"tasks": {name: {"value": value, "higher_is_better": up} for name, (value, up) in names.items()}}

    assert lost_on_card(made(0.5, 20.0), made(0.4, 22.0)) == pytest.approx(0.15)
    with pytest.raises(SettingsError, match="no task whose figure could fall"):
        lost_on_card({"tasks": {}}, made(1, 1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"forget_data": "x"}, "forget_data does nothing without forget_budget"),
        ({"rehearse": "x"}, "rehearse does nothing without forget_budget"),
        ({"forget_budget": 0.1}, "needs something to measure"),
        ({"forget_budget": -0.1, "forget_data": "x"}, "must be at least 0"),
        ({"forget_budget": 0.1, "forget_data": "x", "forget_every": 0}, "the steps at least 1"),
    ],
)
def test_what_is_refused(tiny_lm_directory, given, tmp_path, wrong, said):
    with pytest.raises(SettingsError, match=said):
        lora.lora(tiny_lm_directory, tmp_path / "out", lora.Settings(**given, **wrong))

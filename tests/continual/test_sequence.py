"""Every technique over a sequence: ordinary directories, the matrix in the record, going on after a kill, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bildung
from bildung.continual import sequence
from bildung.continual.progressive import columns_of
from bildung.continual.tasks import Conversations, LabelledTexts, named
from bildung.continual.train import Settings, kind_of, train
from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job
from bildung.core.record import read_record
from bildung.model.linear import replace_stores
from bildung.model.nf4 import Nf4
from bildung.train import fit as fit_module
from bildung.tune.classifier_head import with_classifier
from tests.contract.test_families import made


def test_plain_training_over_three_tasks(
    encoder: Path, tasks: Any, given: Callable[..., Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    record = train(encoder, out, given(tasks=tasks, steps=30))
    measured = record.measured
    assert measured["tasks"] == ["pets", "times", "colours"] and len(measured["scores"]) == 3
    assert all(row[name]["score"] > 0.9 for row, name in zip(measured["scores"], measured["tasks"], strict=True))
    assert measured["scores"][0]["pets"]["n"] == 30 and measured["average_accuracy"] > 0.6
    assert f"forgetting {measured['forgetting']:.3f}" in capsys.readouterr().out
    assert json.loads((out / "matrix.json").read_text())["forgetting"] == measured["forgetting"]
    assert (out / "matrix.png").stat().st_size > 1000
    for number, name in enumerate(measured["tasks"], start=1):
        place = out / f"{number}-{name}"
        peer = transformers.AutoModelForSequenceClassification.from_pretrained(place).eval()
        assert peer.config.id2label[2] == "times/day"
        lm = bildung.load(place)
        tokens = torch.tensor([[2, 40, 41, 42, 3]])
        with torch.no_grad():
            assert torch.allclose(peer(tokens).logits, lm.model.classify(lm.model.hidden(tokens)), atol=1e-4)
        own = read_record(place)
        assert (
            own is not None
            and own.settings["task"] == name
            and own.measured["scores"] == measured["scores"][number - 1]
        )
    last = read_record(out / "3-colours")
    assert last is not None and [ancestor["settings"]["task"] for ancestor in last.ancestors] == ["pets", "times"]


def test_shared_heads_are_one_choice_between_all_classes(
    encoder: Path, given: Callable[..., Settings], tmp_path: Path
) -> None:
    """Class-incremental: rows of the first task lose against the new ones, and plain training forgets all."""
    record = train(encoder, tmp_path / "out", given(heads="shared", steps=60))
    assert bildung.load(tmp_path / "out" / "2-times").config.num_labels == 4
    assert record.measured["scores"][1]["pets"]["score"] < 0.3 < 0.9 < record.measured["scores"][1]["times"]["score"]


def test_conversations(tiny_lm_directory: Path, tmp_path: Path) -> None:
    """Scores are minus nats; a LoRA goes on learning through all tasks, as an adapter of the first model."""
    files = []
    for name, answer in (("sea", "The sea is blue."), ("sky", "Berlin is in the sky.")):
        path = tmp_path / f"{name}.jsonl"
        turns = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": answer}]
        path.write_text("\n".join([json.dumps({"messages": turns})] * 12))
        files.append(f"{name}={path}")
    settings = Settings(
        tasks=tuple(files),
        held_out=2,
        steps=12,
        learning_rate=1e-2,
        precision="fp32",
        rank=4,
        method="ewc",
        ewc={"examples": 4, "pilot": 3},  # type: ignore[arg-type]
    )
    record = train(tiny_lm_directory, tmp_path / "out", settings)
    first, second = (row["sea"]["score"] for row in record.measured["scores"])
    assert record.measured["scores_before"]["sea"]["score"] < first < 0 and second < first
    lm = bildung.load(tmp_path / "out" / "2-sky")
    deltas = [linear.deltas for linear in lm.model.linears().values() if linear.deltas]
    assert all(list(one) == ["default"] and one["default"].rank == 4 for one in deltas)


@pytest.mark.slow
def test_a_killed_sequence_goes_on_in_the_task_it_was_in(
    encoder: Path, given: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = given(steps=12, checkpoint_every=4, method="rehearsal")
    whole = train(encoder, tmp_path / "whole", settings)
    log, done = fit_module.Log.add, []

    def killed(self: Any, row: dict[str, Any]) -> None:
        log(self, row)
        done.append(row["step"])
        if len(done) == 18:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_module.Log, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            train(encoder, tmp_path / "out", settings)
    partial = tmp_path / "out.partial"
    first = (partial / "1-pets" / "record.json").stat()
    assert not (tmp_path / "out").exists() and (partial / "2-times.partial").exists()
    learned: list[int] = []
    step = sequence.run_within_budget

    def counted(*args: Any, **kwargs: Any) -> Any:
        history = step(*args, **kwargs)
        learned.append(history.steps)
        return history

    monkeypatch.setattr(sequence, "run_within_budget", counted)
    record = train(encoder, tmp_path / "out", settings)
    again = (tmp_path / "out" / "1-pets" / "record.json").stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns) and learned == [12]
    assert record.measured["scores"] == whole.measured["scores"]
    a, b = (bildung.load(tmp_path / name / "2-times").model.state_dict() for name in ("whole", "out"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.slow
def test_a_finished_sequence_is_up_to_date_and_may_be_gone_on_from(
    encoder: Path, tasks: Any, given: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = given(steps=2)
    made = train(encoder, tmp_path / "out", settings)
    assert train(encoder, tmp_path / "out", settings).started == made.started
    more = train(tmp_path / "out" / "2-times", tmp_path / "more", given(tasks=(tasks[0], tasks[2]), steps=1))
    assert any("rows of the classifier that were kept: pets/cat, pets/dog" in note for note in more.notes)


def test_a_test_set_of_its_own(encoder: Path, tasks: Any, given: Callable[..., Settings], tmp_path: Path) -> None:
    other = tmp_path / "test.jsonl"
    other.write_text('{"text": "a cat", "label": "cat"}\n{"text": "a dog", "label": "dog"}\n')
    record = train(encoder, tmp_path / "out", given(tests=(f"pets={other}",), steps=1))
    assert record.measured["scores"][0]["pets"]["n"] == 2 and record.measured["scores"][0]["times"]["n"] == 30


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tasks": ("a=x", "a=y")}, "'a' is given twice"),
        ({"tasks": ("a=x",)}, "at least 2"),
        ({"tasks": ("a=x", "b")}, "NAME=DATA is expected"),
        ({"tasks": ("a/b=x", "b=y")}, "NAME=DATA is expected"),
        ({"tests": ("c=x",)}, "'c' is none of the tasks"),
        ({"held_out": 0}, "leaves nothing to measure"),
        ({"evaluate_every": 5}, "leave out parallel, evaluate_every"),
        ({"method": "progressive", "heads": "shared"}, "must be told the task"),
        ({"method": "rehearsal", "rehearsal": {"generate": True}}, "a classifier writes no texts"),
        ({"ewc": {"share": 0.3}}, "settings of ewc were given, and method is 'plain'"),
        ({"method": "fel", "fel": {"positive": 3000}}, "positive = 3000 and .* at most units = 2048"),
    ],
)
def test_what_is_refused(
    encoder: Path, given: Callable[..., Settings], tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises((SettingsError, DataError), match=said):
        train(encoder, tmp_path / "out", given(**{"steps": 1, **wrong}))
    assert not (tmp_path / "out").exists()


def test_what_conversations_do_not_take(tiny_lm_directory: Path, tasks: Any, tmp_path: Path) -> None:
    talks = tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "So."}]
    talks.write_text("\n".join([json.dumps({"messages": turns})] * 6))
    common = {"tasks": (f"a={talks}", f"b={talks}"), "held_out": 1, "steps": 1, "precision": "fp32"}
    with pytest.raises(SettingsError, match="conversations have none"):
        train(tiny_lm_directory, tmp_path / "out", Settings(**common, method="fel"))
    with pytest.raises(SettingsError, match="leave out rank"):
        train(tiny_lm_directory, tmp_path / "out", Settings(**common, method="fel", rank=3))


SMALL: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain rank": {"rank": 4, "learning_rate": 2e-2},
    "rehearsal": {},
    "ewc": {"ewc": {"examples": 8, "pilot": 3}},
    "ewc of each": {"ewc": {"examples": 8, "pilot": 3, "online": False}},
    "ewc rank": {"ewc": {"examples": 8, "pilot": 3}, "rank": 4, "learning_rate": 2e-2},
    "lwf": {},
    "progressive": {"progressive": {"width": 12, "lateral": 8}},
    "orthogonal_lora": {"orthogonal_lora": {"rank": 4}, "learning_rate": 2e-2},
    "fel": {"learning_rate": 2e-2, "fel": {"units": 256, "trunk": True}},
}


@pytest.mark.parametrize(
    "name", [name if name == "progressive" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_a_decoder_learns_labelled_texts_from_its_last_token(
    name: str, tiny_lm_directory: Path, given: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = {"learn": "labelled", "method": name.split()[0], "steps": 20, "learning_rate": 1e-2, **SMALL[name]}
    measured = train(tiny_lm_directory, tmp_path / "out", given(**settings)).measured
    pets, times = (bildung.load(tmp_path / "out" / place) for place in ("1-pets", "2-times"))
    assert times.config.kind == "classifier" and times.config.raw["id2label"]["3"].startswith("times/")
    first, second = (row["pets"]["score"] for row in measured["scores"])
    for number, task in enumerate(("pets", "times")):
        before, after = (row[task]["loss"] for row in (measured["scores_before"], measured["scores"][number]))
        assert after < before - 0.03
    assert measured["backward_transfer"] == pytest.approx(second - first)
    assert (times.added == ["deltas"]) == ("rank" in name)
    tokens_BL, keep_BL = torch.tensor([[0, 40, 41, 42], [0, 50, 2, 2]]), torch.ones(2, 4).bool()
    keep_BL[1, 2:] = False  # the column of a padded row's last token, too, is that of its last real one
    with torch.no_grad():
        alone = times.model(tokens_BL[1:, :2])
        assert torch.allclose(times.model(tokens_BL, keep_BL=keep_BL)[1:], alone, atol=1e-5)
        if name == "progressive":
            assert second == first
            columns = columns_of(times)
            assert columns is not None and columns.active == 1
            columns.active = 0
            assert torch.equal(times.model(tokens_BL)[:, :2], pets.model(tokens_BL)[:, :2])


def test_what_a_decoder_is_to_learn_is_asked_and_what_it_cannot_is_refused(
    tiny_lm_directory: Path, encoder: Path, given: Callable[..., Settings], tmp_path: Path
) -> None:
    headed = with_classifier(Job("x", None, tmp_path, None), bildung.load(tiny_lm_directory), ("a", "b"), 0)
    source = bildung.save(headed, tmp_path / "source")
    assert isinstance(kind_of(bildung.load(source), given()), LabelledTexts)  # it has a head: that says it
    assert isinstance(kind_of(bildung.load(tiny_lm_directory), given()), Conversations)
    for place, learn, said in (
        (source, "conversations", "a llama of kind 'classifier' learns no conversations here"),
        (encoder, "conversations", "a bert of kind 'encoder' learns no conversations here"),
        (bildung.save(made("t5"), tmp_path / "t5"), "labelled", "a t5 of kind 'encoder-decoder' learns no labelled"),
    ):
        with pytest.raises(SettingsError, match=said):
            train(place, tmp_path / "no", given(steps=1, learn=learn))
    replace_stores(headed.model, "*.layers.*", lambda linear: Nf4.quantize(linear.base.dense().detach()))
    with pytest.raises(SettingsError, match=r"is quantized: .* Give rank"):
        train(bildung.save(headed, tmp_path / "quantized"), tmp_path / "no", given(steps=1))


def test_names_of_tasks_and_rows_of_the_head(tasks: Any) -> None:
    assert named(("a=x=y",), "tasks") == {"a": "x=y"}
    for own, groups in ((True, [0, 0, 1, 1]), (False, [0, 0, 0, 0])):
        kind = LabelledTexts(16, own)
        for name, place in (one.split("=") for one in tasks[:2]):
            kind.read(name, place, None, 5, 0, text="text", second=None, label="label", limit=None)
        assert kind.groups == groups and kind.rows_of(1) == ([2, 3] if own else [0, 1, 2, 3])

"""`bildung plan`: every operation, on the command line; what fits, the smallest change first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bildung.app.cli import run
from bildung.app.plan import bytes_of, settings_of, words
from bildung.app.planning import using
from bildung.app.planning.advice import devices, in_words, what_fits
from bildung.app.planning.passing import looked
from bildung.app.planning.tables import arithmetic
from bildung.app.planning.training import subject
from bildung.compress.quantize import Settings as Quantize
from bildung.compress.quantize import quantize
from bildung.core.errors import DataError, SettingsError
from bildung.model.config import from_dict
from bildung.model.count import on_paper
from bildung.train.plan import Plan
from bildung.tune.long_lora import add_long_lora, longer

LLAMA = "{model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2"
LLAMA += ", max_position_embeddings: 64}"
BERT = "{model_type: bert, hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24}"
NEVER = ["--seconds", "0"]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    run(["plan", *arguments])
    return " ".join(capsys.readouterr().out.split())


def test_exam_row_5() -> None:
    """One layer, n tokens, width d, feed-forward 4d: the terms that `bildung plan` prints, per token."""
    for n, d in ((32, 64), (64, 64), (32, 128)):
        keys = {"model_type": "gpt2", "n_embd": d, "n_head": 2, "n_layer": 1, "vocab_size": 50, "n_positions": 64}
        table = arithmetic(on_paper(from_dict(keys)), n)
        names, numbers = (list(table.columns[column].cells) for column in (1, 2))
        found = {name: int(number.replace(",", "")) for name, number in zip(names, numbers, strict=True)}
        assert found["attn.qkv"] == 3 * d**2 and found["attn.out"] == d**2
        assert found["attn.scores"] == found["attn.mixing"] == n * d
        assert found["mlp"] == 8 * d**2
        assert found["forward pass"] == 12 * d**2 + 2 * n * d + 50 * d


def test_a_tuning_on_the_command_line(tiny_lm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown = planned(
        capsys,
        "tune lora",
        str(tiny_lm.path),
        *("--given", "rank=2", "max_length=32", "steps=3", "data=mini:chat", "--seconds", "0.1"),
    )
    for said in ("attn.scores", "activations", "zero3", "textbook", "DeepSpeed", "It fits", "tokens/s", ": 3 steps of"):
        assert said in shown


@pytest.mark.parametrize(
    "operation, given",
    [
        ("tune full", ()),
        ("align dpo", ("batch_size=1",)),
        ("pretrain causal", (f"model={LLAMA}",)),
        (
            "pretrain masked",
            (
                "model={model_type: bert, hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2}",
                "max_length=32",
            ),
        ),
        pytest.param(
            "pretrain seq2seq",
            ("model={model_type: rnn_seq2seq, hidden_size: 8}", "batch_tokens=256"),
            marks=pytest.mark.slow,
        ),
        ("pretrain prefix", (f"model={LLAMA}",)),
        ("pretrain bptt", ("model={model_type: rnn, hidden_size: 16}",)),
        ("pretrain image", ("model={model_type: vit, image_size: 12, patch_size: 4, hidden_size: 12}",)),
    ],
)
def test_every_operation_that_trains(
    tiny_lm: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, operation: str, given: tuple[str, ...]
) -> None:
    tiny_lm.tokenizer.save(tmp_path)
    source = tmp_path if operation.startswith("pretrain") else tiny_lm.path
    shown = planned(capsys, operation, str(source), "--given", *given, *NEVER)
    assert f"{operation} from" in shown and "peak" in shown and "It fits" in shown


def test_every_operation_that_does_not(
    tiny_lm: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bildung.app.planning.passes.own_bytes", lambda *_: 10**8)  # a process that would be started
    for operation in using.OPERATIONS:
        shown = planned(capsys, operation, str(tiny_lm.path))
        assert f"{operation} from" in shown and "weights" in shown and "It fits" in shown
    small = using.use("generate", tiny_lm.path, {"prompt": 16, "new_tokens": 16}, 0)
    large = using.use("generate", tiny_lm.path, {"prompt": 16, "new_tokens": 16, "rows": 4}, 0)
    # 2 (keys and values) · 2 layers · 2 heads · 32 tokens · 8 · 4 bytes
    assert small.parts["keys and values"] == 2 * 2 * 2 * 32 * 8 * 4
    assert large.parts["keys and values"] == 4 * small.parts["keys and values"]
    with pytest.raises(SettingsError, match="'temperature' says nothing about the memory of 'generate'"):
        using.use("generate", tiny_lm.path, {"temperature": 1}, 0)


def test_a_quantized_base_is_planned_as_it_lies_there(tiny_lm: Any, tmp_path: Path) -> None:
    made = quantize(tiny_lm.path, tmp_path / "nf4", Quantize(method="nf4", compare_texts=1))
    (foretold,) = looked("quantize", tiny_lm.path, {"method": "nf4", "compare_texts": 1}, own=0)
    assert foretold.passes[0].beside["the result, read"] == made.measured["weight_bytes_after"]
    given = settings_of("tune qlora", {"max_length": 16, "rank": 4})
    dense, nf4 = (subject("tune lora", path, given).plan(False) for path in (tiny_lm.path, tmp_path / "nf4"))
    assert nf4.weights < dense.weights and nf4.trainable == dense.trainable


def test_data_that_is_given_is_what_is_planned(tiny_lm: Any) -> None:
    given = settings_of("tune lora", {"data": "mini:chat", "max_length": 200, "batch_size": 2, "pack": False})
    full, real = (subject("tune lora", tiny_lm.path, given, read_data=read) for read in (False, True))
    assert real.steps is not None and full.steps is None
    assert real.length <= full.length == 200
    assert real.plan(False).peak_bytes <= full.plan(False).peak_bytes


@pytest.mark.parametrize(
    "words", [("prompt", "length=5"), ("prefix", "length=5"), ("adapter", "kind=parallel"), ("ia3",)]
)
def test_only_what_a_method_adds_is_planned(tiny_lm: Any, words: tuple[str, ...]) -> None:
    operation = f"tune {words[0]}"
    values = dict(word.split("=") for word in words[1:])
    model = subject(operation, tiny_lm.path, settings_of(operation, values)).model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0 < trained < tiny_lm.model.embedding.weight.numel()


def peak_of(operation: str, given: Any) -> int:
    """A made-up machine: weights 400, state 800, and 100 per row of 512 tokens, a third of it if recomputed."""
    states = {"tune full": 1600, "tune lora": 400, "tune qlora": 100}[operation]
    if operation == "tune full" and given.optimizer == "adamw_8bit":
        states -= 600
    each = 100 * given.max_length / 512 / (3 if given.recompute == "blocks" else 1)
    return int(states + given.batch_size * each)


@pytest.mark.parametrize(
    "room, expected",
    [
        (1900, {"batch_size": 2, "micro_steps": 2}),
        (1700, {"batch_size": 1, "micro_steps": 4}),
        (1650, {"batch_size": 1, "micro_steps": 4, "recompute": "blocks"}),
        (1150, {"optimizer": "adamw_8bit", "recompute": "blocks"}),
        (450, {"batch_size": 1, "micro_steps": 4, "recompute": "blocks", "operation": "tune lora"}),
        (50, None),
    ],
)
def test_the_smallest_change_that_fits(room: int, expected: dict[str, Any] | None) -> None:
    given = settings_of("tune full", {"batch_size": 4, "max_length": 512})
    found = what_fits("tune full", given, peak_of("tune full", given), room, peak_of)
    if expected is None:
        assert found is None
        return
    assert found is not None and found[1] <= room
    changed, peak = found
    assert peak == peak_of(
        changed.get("operation", "tune full"),
        dataclasses.replace(given, **{name: value for name, value in changed.items() if name != "operation"}),
    )
    for name, value in expected.items():
        if name in changed or name not in ("batch_size", "micro_steps", "recompute", "optimizer"):
            assert changed[name] == value


def test_advice_in_words() -> None:
    same = in_words("tune full", {"batch_size": 1, "micro_steps": 4}, 10**9)
    assert same == "`bildung tune full` --batch-size 1 --micro-steps 4 takes 1.00 GB: the same training."
    other = in_words("tune full", {"operation": "tune qlora", "max_length": 256}, 10**9)
    assert "quantize" in other and "tune qlora` --max-length 256" in other
    moments = ({"gradients": 400, "activations": 100},)
    made = Plan(1, 1, 1, weights=800, gradients=400, optimizer=1600, moments=moments)
    assert "2 devices with --parallel zero1" in devices(made, (1, 2, 4), 2200)
    assert devices(made, (1, 2), 100) == ""


def test_too_little_memory_is_said_with_a_remedy(tiny_lm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--given", "max_length=200", "batch_size=8", "--device", "cuda", *NEVER)
    shown = refused(capsys, "tune full", str(tiny_lm.path), *words, "--memory", "2MB")
    assert "too small by" in shown and "takes" in shown and "--" in shown
    shown = refused(capsys, "generate", str(tiny_lm.path), "--memory", "1MB", "--given", "rows=4")
    assert "too small by" in shown


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What was said before exit code 1, which a script can act on."""
    with pytest.raises(SystemExit) as stop:
        run(["plan", *words])
    assert stop.value.code == 1
    return capsys.readouterr().out


def test_a_sharing_that_was_asked_for_counts(
    tiny_lm: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices with zero3 are enough: exit code 0 where zero3 is a setting."""
    monkeypatch.setattr("bildung.app.planning.advice.what_fits", lambda *_: None)
    values = {"batch_size": 1, "max_length": 16, "parallel": "zero3"}
    made = subject("tune full", tiny_lm.path, settings_of("tune full", values)).plan(True)
    words = (f"{name}={value}" for name, value in values.items())
    given = ("tune full", str(tiny_lm.path), "--device", "cuda", *NEVER, "--given", *words)
    memory = f"{0.8 * made.peak_bytes / 1e6}MB"
    assert "One device" in planned(capsys, *given, "--memory", memory)
    refused(capsys, *given, "--memory", memory, "--ranks", "1")
    assert made.divisible == 2
    tensor = [word.replace("zero3", "tensor") for word in given]
    refused(capsys, *tensor, "--memory", memory, "--ranks", "4")
    assert "does not divide" in planned(capsys, *tensor, "--memory", memory, "--ranks", "2", "4")


@pytest.mark.parametrize(
    ("operation", "given", "message"),
    [
        ("generate", "rows=0", "rows = 0 was given; it must be a number of at least 1"),
        ("generate", "prompt=abc", "prompt = 'abc' was given"),
        ("adopt", "dtype=int8", "dtype.*'int8'"),
        ("tune lora", "batch_size=0", "batch_size = 0 was given; it must be at least 1"),
        ("tune long_lora", "length=30", "rows of length = 30 do not fall into groups"),
        ("tune lora", "forget_budget=.nan", "forget_budget = nan"),
        ("tune lora", "rank=[1,2", "cannot be read as YAML"),
        ("generate", "prompt=100000", "prompt = 100000 was given; the model reads at most"),
        ("tune lora", "forget_budget=2", r"2 is 200 %; the budget is a share of at most 1. 2 % is 0.02"),
        ("live", "x=1", "a recipe's steps have their own settings"),
    ],
)
def test_values_that_no_plan_can_be_made_with(tiny_lm: Any, operation: str, given: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(
            [
                "plan",
                operation,
                str(tiny_lm.path),
                "--given",
                given,
                *(["data=mini:moby"] if "long" in operation else []),
            ]
        )


def test_what_a_forgetting_budget_keeps_is_planned(tiny_lm: Any) -> None:
    values = {"rank": 2, "steps": 40, "checkpoint_every": 10, "max_length": 32}
    plain, held = (
        subject("tune lora", tiny_lm.path, settings_of("tune lora", {**values, **more})).plan(False)
        for more in ({}, {"forget_budget": 0.1, "forget_data": "mini:moby"})
    )
    kept = 4 * plain.trainable  # float32
    assert held.parts["kept"] == kept and held.parts["checkpoint"] == plain.parts["checkpoint"] + kept > kept


def test_long_lora_is_planned_with_its_longer_context(tiny_lm: Any) -> None:
    given = {"data": "mini:moby", "length": 4096, "batch_size": 1, "rank": 2}
    made = subject("tune long_lora", tiny_lm.path, settings_of("tune long_lora", given))
    assert (made.rows, made.length, made.model.config.max_position_embeddings) == (1, 4096, 4096)
    real = longer(tiny_lm, 4096, "linear").model
    add_long_lora(real, made.given)
    count = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    assert made.plan(False).trainable == count
    whole = subject("tune long_lora", tiny_lm.path, settings_of("tune long_lora", {**given, "share": 1.0}))
    assert whole.plan(False).parts["activations"] != made.plan(False).parts["activations"]  # attention is in groups


def test_bad_words(tiny_lm: Any) -> None:
    assert bytes_of("24GB") == 24 * 10**9 and bytes_of("1.5 GiB") == 1.5 * 2**30
    for wrong in ("much", "1.2.3GB", ".GB"):
        with pytest.raises(SettingsError, match="24GB"):
            bytes_of(wrong)
    with pytest.raises(SettingsError, match="nowhere is not there; `bildung log --help`"):
        run(["plan", "log", "nowhere"])
    with pytest.raises(SettingsError, match="'look attention' does not train"):
        settings_of("look attention", {})
    with pytest.raises(SettingsError, match="rank"):
        settings_of("tune lora", {"rnak": 3})
    with pytest.raises(SettingsError, match="name=value"):
        words(("rank",))
    with pytest.raises(SettingsError, match="nowhere is not there; give the directory of one"):
        subject("tune lora", Path("nowhere"), settings_of("tune lora", {}))
    with pytest.raises(DataError, match="a llama is no encoder"):
        subject("pretrain masked", Path("nowhere"), settings_of("pretrain masked", words((f"model={LLAMA}",))))
    with pytest.raises(SettingsError, match="ranks = 0"):
        run(["plan", "tune lora", str(tiny_lm.path), "--ranks", "0"])

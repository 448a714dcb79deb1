"""recipes/characters.yaml, nursery.yaml and gpt2_124m.yaml, shortened: births that end in directories others load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import bildung
from bildung.app import plan
from bildung.app.live import Command, command
from bildung.core.record import Record, read_record
from bildung.train.history import METRICS
from bildung.train.live_page import NAME
from tests.processes import torchrun

RECIPES = Path(bildung.__file__).parent.parent / "recipes"
TEXT = [
    f"In chapter {n} the captain of ship {n % 7} saw {n % 5} whales, and {n % 3} boats went down." for n in range(90)
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": one}) for one in TEXT))
    return path


def shortened(name: str, tmp_path: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """The recipe with other settings for its steps, by name; `from` and `data` among them."""
    recipe = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    recipe["out"] = str(tmp_path / "life")
    for step in recipe["life"]:
        given = changes.get(step["as"], {})
        step["from"] = given.pop("from", step.get("from")) or recipe["life"][0]["as"]
        step["with"] = {**step["with"], **given}
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return short


def made(tmp_path: Path) -> Record:
    record = read_record(tmp_path / "life/model")
    assert record is not None
    return record


def assert_transformers_agrees(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ours = bildung.load(directory)
    ids = ours.tokenizer.encode("In chapter 3 the captain")
    assert transformers.AutoTokenizer.from_pretrained(directory)("In chapter 3 the captain")["input_ids"] == ids
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(logits, ours.model(torch.tensor([ids])), atol=1e-4, rtol=1e-4)


SHORT = {"steps": 12, "batch_size": 4, "max_length": 32, "held_out": 4, "evaluate_every": 6, "sample_tokens": 4}


@pytest.mark.filterwarnings("ignore")
def test_characters(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = shortened(
        "characters.yaml", tmp_path, {"letters": {"from": str(text)}, "model": {"data": str(text), **SHORT}}
    )
    command(Command(recipe=recipe))
    measured = made(tmp_path).measured
    said = f"held out: {measured['held_out_bits_per_byte']:.3f} bits per byte"
    assert said in (printed := capsys.readouterr().out)
    assert f"Kneser-Ney: {measured['kneser_ney_bits_per_byte']:.3f}" in printed
    assert measured["loss_last"] < measured["loss_first"] and measured["flops_utilisation"] > 0
    log = [json.loads(line) for line in (tmp_path / "life/model" / METRICS).read_text().splitlines()]
    assert [row["step"] for row in log if "samples" in row] == [6, 12]
    assert "Samples after step 12" in (tmp_path / "life/model" / NAME).read_text()
    assert_transformers_agrees(tmp_path / "life/model")


@pytest.mark.filterwarnings("ignore")
def test_the_nursery(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = shortened(
        "nursery.yaml",
        tmp_path,
        {
            "words": {"from": str(text), "also": [], "vocab_size": 300},
            "model": {"data": str(text), **SHORT},
        },
    )
    command(Command(recipe=recipe))
    assert 5e6 < made(tmp_path).measured["trainable_parameters"] + (8192 - 300) * 256 < 10e6
    assert "Kneser-Ney" in capsys.readouterr().out
    assert_transformers_agrees(tmp_path / "life/model")


def test_gpt2_is_planned_as_published(
    tiny_lm_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """124,439,808 parameters with GPT-2's own vocabulary; the tiny tokenizer's rows of 768 are fewer."""
    step = yaml.safe_load((RECIPES / "gpt2_124m.yaml").read_text(encoding="utf-8"))["life"][1]
    left_out = ("data", "parallel", "sample_prompts")
    words = [f"{name}={json.dumps(value)}" for name, value in step["with"].items() if name not in left_out]
    tokenizer = bildung.load(tiny_lm_directory).tokenizer
    (tmp_path / "words").mkdir()
    tokenizer.save(tmp_path / "words")
    given = plan.Command(
        operation="pretrain causal", source=tmp_path / "words", given=tuple(words), memory="80GB", ranks=(8,), seconds=0
    )
    plan.command(given)
    said = capsys.readouterr().out
    assert f"{124_439_808 - (50257 - tokenizer.vocab_size) * 768:,} parameters" in said
    assert "12 layers, width 768, 12 heads of 64" in said and "rows of 1024" in said
    assert "It fits one device with 80" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gpt2s_first_steps_on_two_processes(text: Path, tiny_lm_directory: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.mkdir()
    bildung.load(tiny_lm_directory).tokenizer.save(words)
    recipe = shortened(
        "gpt2_124m.yaml",
        tmp_path,
        {
            "tokens": {"from": str(words), "data": str(text), "held_out": 4, "limit": None},
            "model": {
                "model": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4},
                **{"max_length": 32, "batch_size": 2, "steps": 20, "evaluate_every": 10, "sample_tokens": 4},
            },
        },
    )
    done = torchrun("-m", "bildung", "live", str(recipe), timeout=600)
    assert done.returncode == 0, done.stderr[-9000:]
    record = made(tmp_path)
    assert record.settings["parallel"] == "zero1" and record.settings["micro_steps"] % 2 == 0
    assert record.measured["steps"] == 20
    assert record.measured["held_out_loss_last"] < record.measured["held_out_loss_first"]
    assert record.measured["held_bytes_per_rank"]["optimizer"] > 0
    assert_transformers_agrees(tmp_path / "life/model")

"""A model directory from a run that has not ended."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import bildung
from bildung.app.export import Command, command, export
from bildung.core.errors import OutputError, SettingsError
from bildung.core.operation import OccupiedError
from bildung.core.record import read_record
from bildung.pretrain.causal import Settings, causal
from bildung.train import training
from bildung.train.checkpoint import all_in
from bildung.train.history import METRICS
from bildung.train.parts import Parts
from bildung.tune import lora as lora_module

MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
MODEL |= {"num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True}


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch):
    """killed_after(steps, operation, *arguments): the operation dies after so many steps."""

    def run(steps: int, operation, *arguments: object) -> None:
        real = training.fit

        def fit(*given: object, **named: object) -> object:
            real(*given, **{**named, "steps": steps})
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(training, "fit", fit)
            operation(*arguments)

    return run


@pytest.fixture
def birth(tiny_lm: bildung.LanguageModel, tmp_path: Path) -> tuple[Path, Settings]:
    """(directory of a tokenizer, settings of a birth)."""
    words = tmp_path / "words"
    words.mkdir()
    tiny_lm.tokenizer.save(words)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"the number {n % 7} and the number {n % 5}"}) for n in range(60)))
    given = Settings(data=str(text), model=json.dumps(MODEL), steps=20, max_length=32, batch_size=2, held_out=6)
    return words, dataclasses.replace(given, checkpoint_every=5, keep_last=2, evaluate_every=5, precision="fp32")


@pytest.mark.slow
def test_a_birth(killed_after, birth, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, given = birth
    causal(words, tmp_path / "whole", given)
    killed_after(12, causal, words, tmp_path / "run", given)
    work = tmp_path / "run.partial"
    kept = [place.name for place in all_in(work)]
    command(Command(run=tmp_path / "run", out=tmp_path / "elsewhere" / "after"))
    assert "the model after step 12" in capsys.readouterr().out
    made = bildung.load(tmp_path / "elsewhere/after")
    stored = Parts([work / kept[-1] / "part-0.safetensors"])
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, stored.read(f"model.{name}")), name
    record = read_record(tmp_path / "elsewhere/after")
    assert record is not None and record.operation == "pretrain causal"
    assert record.measured["steps"] == 12 and record.measured["kneser_ney_bits_per_byte"] > 0
    assert any("exported after step 12 of run" in note for note in record.notes)
    assert not (tmp_path / "elsewhere/after.partial").exists()
    # An older checkpoint; and the run is as it was, and ends as if nothing had been.
    assert export(work, tmp_path / "older", step=10) == 10
    assert bildung.load(tmp_path / "older").record.measured["steps"] == 10  # type: ignore[union-attr]
    rows = [json.loads(line) for line in (work / METRICS).read_text().splitlines()]
    lowest = min((row for row in rows if "held_out_loss" in row), key=lambda row: row["held_out_loss"])["step"]
    assert export(work, tmp_path / "best", best=True) == lowest
    assert [place.name for place in all_in(work)] == kept
    causal(words, tmp_path / "run", given)
    one, two = (bildung.load(tmp_path / name).model.state_dict() for name in ("whole", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(OccupiedError):  # a snapshot is not taken for the finished model
        causal(words, tmp_path / "older", given)


def test_an_adapter(killed_after, tiny_lm_directory: Path, tmp_path: Path) -> None:
    given = lora_module.Settings(data="mini:chat", steps=6, rank=2, checkpoint_every=2, precision="fp32", limit=8)
    killed_after(3, lora_module.lora, tiny_lm_directory, tmp_path / "run", given)
    assert export(tmp_path / "run", tmp_path / "adapter") == 3
    assert (tmp_path / "adapter/adapter_config.json").exists()
    assert bildung.load(tmp_path / "adapter").record.measured["steps"] == 3  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_it(killed_after, birth, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words, given = birth
    killed_after(5, causal, words, tmp_path / "run", given)
    export(tmp_path / "run", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[5, 9, 7, 30]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, bildung.load(tmp_path / "out").model(tokens))


def test_what_cannot_be_exported(killed_after, birth, tmp_path: Path) -> None:
    words, given = birth
    with pytest.raises(OutputError, match="no training run"):
        export(tmp_path / "nothing", tmp_path / "out")
    killed_after(12, causal, words, tmp_path / "run", given)
    with pytest.raises(SettingsError, match="no checkpoint of step 7; there are: 10, 12"):
        export(tmp_path / "run", tmp_path / "out", step=7)
    with pytest.raises(OutputError, match="choose another place"):
        export(tmp_path / "run.partial", tmp_path / "run")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="choose another place"):
        export(tmp_path / "run", tmp_path / "taken")
    text = Path(given.data)
    text.write_text(text.read_text() + '\n{"text": "one more"}')
    with pytest.raises(OutputError, match=r"has changed: data\."):  # and is not trained from the beginning
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert (tmp_path / "run.partial").exists()
    text.write_text(text.read_text().removesuffix('\n{"text": "one more"}'))
    causal(words, tmp_path / "run", given)
    with pytest.raises(OutputError, match="finished, and a model directory already"):
        export(tmp_path / "run", tmp_path / "out")

"""Bytes before a run: counted on fake tensors, equal to what autograd really keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bildung.app.cli import run
from bildung.app.plan import advice, as_trained, bytes_of, settings_of
from bildung.core.errors import SettingsError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.count import on_paper
from bildung.train.plan import Plan, plan, saved_bytes, speed
from tests.train.parallel_run import KEYS


def really_kept(model: torch.nn.Module, rows: int, length: int) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = model.hidden(torch.zeros(rows, length, dtype=torch.long))
    del h
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_counted_is_what_is_kept(dtype: torch.dtype) -> None:
    model = build(from_dict(KEYS))
    model.compute_dtype = dtype
    counted = saved_bytes(on_paper(from_dict(KEYS)), 3, 40, dtype)
    assert counted == pytest.approx(really_kept(model, 3, 40), rel=0.02)
    assert saved_bytes(model, 6, 40, dtype) == pytest.approx(2 * counted, rel=0.1)


SMALL = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
BART = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1}
KINDS = {
    "learned positions": {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 50},
    "dynamic rope": {**KEYS, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "encoder": {"model_type": "bert", **SMALL, "vocab_size": 50},
    "encoder-decoder": {"model_type": "bart", **BART, "decoder_layers": 1, "vocab_size": 50},
    "recurrent": {"model_type": "rnn", "hidden_size": 16, "vocab_size": 50},
    "seq2seq": {"model_type": "rnn_seq2seq", "hidden_size": 16, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
    "images": {"model_type": "vit", **SMALL, "image_size": 12, "patch_size": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_planned_and_timed(kind: str) -> None:
    model = on_paper(from_dict(KINDS[kind])).requires_grad_(True)
    made = plan(model, rows=2, length=10)
    assert 0 < made.activations < plan(model, rows=6, length=10).activations
    assert speed(model, rows=2, length=10, seconds=0.01) > 0


def test_a_birth_is_planned_with_what_its_tokenizer_knows(  # type: ignore[no-untyped-def]
    tiny_lm, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_lm.tokenizer.save(tmp_path)
    keys = "{model_type: rnn_seq2seq, hidden_size: 8}"
    run(["plan", "pretrain seq2seq", str(tmp_path), "--given", f"model={keys}", "--seconds", "0"])
    assert "pretrain seq2seq from" in capsys.readouterr().out
    keys = "{model_type: vit, image_size: 12, patch_size: 4, hidden_size: 12, num_hidden_layers: 1}"
    run(["plan", "pretrain image", "nothing", "--given", f"model={keys}", "--seconds", "0"])
    assert "pretrain image from nothing" in capsys.readouterr().out


def test_parts_of_a_full_training() -> None:
    model = on_paper(from_dict(KEYS)).requires_grad_(True)
    made = plan(model, rows=2, length=16)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert (made.weights, made.gradients, made.optimizer) == (4 * size, 4 * size, 8 * size)
    assert made.parameters == made.trainable == size


def test_ranks_share_what_the_textbook_says() -> None:
    made = Plan(1, 1, 1, weights=800, gradients=400, optimizer=1600, activations=100, logits=10, runtime=5)
    assert made.on(1, "ddp") == made.on(4, "ddp") == 800 + 1600 + 400 + 15
    assert made.on(4, "zero1") == 800 + 400 + 400 + 15
    assert made.on(4, "zero2") == 800 + 400 + 100 + 15
    assert made.on(4, "zero3") == 200 + 400 + 100 + 15
    assert "2 devices with --parallel zero1" in " ".join(advice(made, (1, 2, 4), 2200, rows=2))
    assert "It fits" in advice(made, (1,), 10**6, rows=2)[0]


def test_on_the_command_line(tiny_lm, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    words = [
        "plan",
        "tune lora",
        str(tiny_lm.path),
        "--given",
        "rank=2",
        "max_length=32",
        "steps=3",
        "--seconds",
        "0.1",
    ]
    run(words)
    shown = capsys.readouterr().out
    assert "activations" in shown and "tokens/s" in shown and "3 steps" in shown


@pytest.mark.parametrize(
    "words", [("prompt", "length=5"), ("prefix", "length=5"), ("adapter", "kind=parallel"), ("ia3",)]
)
def test_only_what_a_method_adds_is_planned(tiny_lm, words: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    operation = f"tune {words[0]}"
    model, _, _ = as_trained(operation, tiny_lm.path, settings_of(operation, words[1:]))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0 < trained < tiny_lm.model.embedding.weight.numel()


def test_bad_words() -> None:
    assert bytes_of("24GB") == 24 * 10**9 and bytes_of("1.5 GiB") == 1.5 * 2**30
    with pytest.raises(SettingsError, match="24GB"):
        bytes_of("much")
    with pytest.raises(SettingsError, match="does not train"):
        settings_of("quantize", ())
    with pytest.raises(SettingsError, match="rank"):
        settings_of("tune lora", ("rnak=3",))

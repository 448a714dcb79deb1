"""`bildung show`: what it says of a config alone, of directories, adapters and quantized models; and the drawing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.app.cli import run
from bildung.app.show import look_at, spans
from bildung.app.show_picture import draw
from bildung.app.show_stacks import stacks_of
from bildung.core.errors import ConfigError, SettingsError
from bildung.model.bottleneck import Bottleneck
from bildung.model.linear import replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import METHODS
from bildung.model.store import write_attached
from bildung.model.virtual import Prompt, add_virtual
from tests.model.tiny import tiny_lm


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps({"model_type": "gpt2"}))
    return path


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    run(["show", *argv])
    return capsys.readouterr().out


def test_a_config_alone(gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's 124,439,808 parameters; the terms of the exam times 12 layers, per token of 100."""
    text = shown(capsys, str(gpt2), "--length", "100")
    assert "decoder, 124,439,808 parameters" in text and "no weights were read" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "56,669,184" in lines["layers.0-11.mlp"] and f"{12 * 8 * 768**2:,}" in lines["layers.0-11.mlp"]
    assert f"{12 * 3 * 768**2:,}" in lines["layers.0-11.attn.qkv"]
    assert f"{12 * 100 * 768:,}" in lines["layers.0-11.attn.scores"]
    assert "layers.3.attn.z" not in text
    assert "layers.3.attn.z" in shown(capsys, str(gpt2), "--sites")


def test_a_directory_an_adapter_and_a_quantized_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = bildung.save(tiny_lm(), tmp_path / "base")
    assert "stored: 15 matrices float32" in shown(capsys, str(base))
    lm = bildung.load(base)
    for linear in list(lm.model.linears().values())[:3]:
        linear.deltas["tuned"] = LowRank(linear.in_features, linear.out_features, 4, 1.0)
        torch.nn.init.normal_(linear.deltas["tuned"].lora_B)
    text = shown(capsys, str(bildung.save(lm, tmp_path / "tuned")))
    assert "delta 'default': LowRank on 3 matrices, rank 4" in text and "in deltas" in text
    lm = bildung.load(base)
    replace_stores(lm.model, "mlp.*", lambda linear: METHODS["nf4"].quantize(linear.base.dense().detach()))
    text = shown(capsys, str(bildung.save(lm, tmp_path / "nf4")))
    assert "6 matrices Nf4" in text and "9 matrices float32" in text


def test_no_more_tokens_than_the_context_has_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bildung.save(tiny_lm(), tmp_path / "llama")  # of RoPE, which knows no end; the config does
    assert "128 tokens in one row" in shown(capsys, str(tmp_path / "llama"))
    assert "300 tokens in one row" in shown(capsys, str(tmp_path / "llama"), "--length", "300")


def test_virtual_tokens_and_bottlenecks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = bildung.save(tiny_lm(), tmp_path / "base")
    lm = bildung.load(base)
    add_virtual(lm.model, Prompt(torch.zeros(7, lm.config.hidden_size)))
    bildung.save(lm, tmp_path / "prompt")
    run(["show", str(tmp_path / "prompt")])
    assert "7 virtual tokens before every text, as a prompt" in " ".join(capsys.readouterr().out.split())
    lm = bildung.load(base)
    bildung.attach(lm.model, "layers.1.mlp.out", Bottleneck(lm.config.hidden_size, 3, "relu"))
    (tmp_path / "attached").mkdir()
    write_attached(lm, tmp_path / "attached")
    run(["show", str(tmp_path / "attached")])
    assert "attached modules at layers.1.mlp.out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_drawing_is_written(suffix: str, gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = gpt2.with_suffix(suffix)
    assert f"drawn into {picture}" in shown(capsys, str(gpt2), "--picture", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


COMPOSED: dict[str, Any] = dict(
    model_type="bildung", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, [["RMSNorm", "attention, sees what is before"], ["RMSNorm", "feed-forward"]]),
        ({"norm_placement": "post"}, [["attention, sees what is before"], ["feed-forward"]]),
        (
            {"norm_placement": "sandwich", "norm": "layer"},
            [["LayerNorm", "attention, sees what is before", "LayerNorm"], ["LayerNorm", "feed-forward", "LayerNorm"]],
        ),
        (
            {"parallel_residual": True, "causal": False},
            [["RMSNorm", "attention, sees all", "RMSNorm", "feed-forward"]],
        ),
    ],
)
def test_what_is_drawn_is_the_model(changes: dict[str, Any], words: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**COMPOSED, **changes}))
    (stack,) = stacks_of(look_at(path, 8))
    assert [[box.word for branch in branches for box in branch] for branches, _ in stack.sublayers] == words
    behind = [[box.word for box in boxes] for _, boxes in stack.sublayers]
    assert behind == [["RMSNorm"]] * 2 if changes.get("norm_placement") == "post" else not any(behind)


def test_an_encoder_decoder_has_two_columns(tmp_path: Path) -> None:
    path = tmp_path / "t5.json"
    path.write_text(json.dumps({"model_type": "t5", "num_layers": 2, "eos_token_id": 1}))
    encoder, decoder = stacks_of(look_at(path, 8))
    assert len(encoder.sublayers) == 2 and len(decoder.sublayers) == 3
    assert not encoder.heads and [[box.word for box in chain] for chain in decoder.heads] == [["unembedding"]]


def test_heads_stand_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "bert.json"
    path.write_text(json.dumps({"model_type": "bert", "architectures": ["BertForPreTraining"]}))
    shown = look_at(path)
    assert shown.length == 512  # the end of its table
    (stack,) = stacks_of(shown)
    words = [[box.word for box in chain] for chain in stack.heads]
    assert words == [["pooler", "next sentence?"], ["transform", "unembedding"]]


@pytest.mark.parametrize("attention", ["bahdanau", "dot", "none"])
def test_recurrent_models_are_drawn_layer_by_layer(attention: str, tmp_path: Path) -> None:
    """Bahdanau's decoder looks at the source before its step, Luong's after it."""
    path = tmp_path / "seq2seq.json"
    raw = dict(model_type="rnn_seq2seq", vocab_size=50, hidden_size=16, eos_token_id=1, attention=attention)
    path.write_text(json.dumps(raw))
    encoder, decoder = stacks_of(look_at(path))
    assert [[box.word for box in branch] for branch in encoder.sublayers[0][0]] == [["GRU, forward"], ["GRU, backward"]]
    inner = [branches[0][0].word for branches, _ in decoder.sublayers]
    expected = {"bahdanau": ["attention to the encoder", "GRU, layer 0"], "none": ["GRU, layer 0"]}
    assert inner == expected.get(attention, ["GRU, layer 0", "attention to the encoder"])
    draw(look_at(path), tmp_path / "seq2seq.png")


def test_mistakes_are_said(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="a picture ends in"):
        run(["show", str(gpt2), "--picture", "a.gif"])
    with pytest.raises(SettingsError, match="at least 1"):
        run(["show", str(gpt2), "--length", "0"])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list"):
        run(["show", str(tmp_path / "list.json")])
    (tmp_path / "other.json").write_text('{"model_type": "gpt_neo"}')
    with pytest.raises(ConfigError, match="did you mean 'gpt_neox'"):
        run(["show", str(tmp_path / "other.json")])


def test_layers_that_are_alike_share_a_row() -> None:
    assert spans([0, 1, 2, 5]) == "0-2,5" and spans([3]) == "3"

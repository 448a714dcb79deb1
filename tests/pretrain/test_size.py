"""The dial: exact numbers of the rules, and that everything can be set instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bildung
from bildung.core.errors import SettingsError
from bildung.pretrain.causal import Settings, causal
from bildung.pretrain.size import Laws, chosen, shape

MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("layers", "width", "heads", "forward"),
    [(1, 128, 1, 384), (2, 128, 1, 384), (4, 256, 2, 704), (5, 384, 3, 1024), (12, 768, 6, 2048), (24, 1536, 12, 4096)],
)
def test_the_shape_of_every_size(layers: int, width: int, heads: int, forward: int) -> None:
    assert shape(layers, 512) == {
        "hidden_size": width,
        "intermediate_size": forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
    }


def test_the_laws_in_numbers() -> None:
    """By hand, for 12 layers of 768 with GPT-2's vocabulary: C = (72·12·768² + 12·12·768·1024) · 20 · 123,551,232."""
    laws = Laws(parameters=123_551_232, layers=12, width=768, row=1024)
    assert laws.tokens == 2_471_024_640
    assert laws.operations == 622_854_144 * 2_471_024_640
    assert laws.step_tokens == pytest.approx(0.2920 * 10 ** (0.3271 * 18.187265), rel=1e-5)
    assert round(laws.step_tokens, -2) == 259_700 and round(laws.learning_rate, 6) == 0.001661


def test_everything_follows_from_the_size(tokenizer_directory: Path) -> None:
    made, said = chosen(Settings(data="x", size=4, max_length=256), tokenizer_directory)
    keys = json.loads(made.model or "")
    assert keys == {**shape(4, 256), "model_type": "llama", "tie_word_embeddings": True}
    # 300 tokens: 4 · (4 · 256² + 3 · 256 · 704 + 2 · 256) + 300 · 256 + 256
    parameters = 4 * (4 * 256**2 + 3 * 256 * 704 + 2 * 256) + 300 * 256 + 256
    laws = Laws(parameters, 4, 256, 256)
    assert made.learning_rate == float(f"{laws.learning_rate:.3g}") == 0.00397
    assert round(laws.step_tokens, -2) == 26_600, "about 104 rows, as a power of two 128"
    assert (made.batch_size, made.micro_steps) == (64, 2)
    assert made.steps == -(-20 * parameters // (128 * 256))
    for words in ("size 4: 4 layers, width 256, 2 heads of 128", f"{parameters:,} parameters", f"{made.steps:,} steps"):
        assert words in said
    assert "as given" not in said


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"batch_size": 8}, {"batch_size": 8, "micro_steps": 16}),
        ({"micro_steps": 4}, {"batch_size": 32, "micro_steps": 4}),
        ({"batch_size": 8, "micro_steps": 3}, {"batch_size": 8, "micro_steps": 3}),
        ({"steps": 7}, {"steps": 7}),
        ({"epochs": 2.0}, {"steps": None, "epochs": 2.0}),
        ({"learning_rate": 1e-3}, {"learning_rate": 1e-3}),
    ],
    ids=str,
)
def test_every_rule_gives_way(tokenizer_directory: Path, given: dict, found: dict) -> None:
    made, said = chosen(Settings(data="x", size=4, **given), tokenizer_directory)
    assert {name: getattr(made, name) for name in found} == found
    assert all(name in said.splitlines()[-1] for name in given)


def test_keys_of_the_model_give_way_and_the_rules_read_them(tokenizer_directory: Path) -> None:
    plain, _ = chosen(Settings(data="x", size=4), tokenizer_directory)
    keys = {"num_hidden_layers": 2, "num_attention_heads": 4}
    other, said = chosen(Settings(data="x", size=4, model=json.dumps(keys)), tokenizer_directory)
    assert json.loads(other.model or "") == {**json.loads(plain.model or ""), **keys}
    assert (other.learning_rate, other.micro_steps) == (0.00471, 1)
    assert (plain.learning_rate, plain.micro_steps) == (0.00397, 2)
    assert "4 heads of 64" in said
    assert said.splitlines()[-1] == "  as given, not by rule: num_attention_heads, num_hidden_layers"
    gpt2, said = chosen(Settings(data="x", size=12, model="{model_type: gpt2, n_head: 12}"), tokenizer_directory)
    assert "12 layers, width 768, 12 heads of 64, feed-forward 3072" in said
    assert json.loads(gpt2.model or "")["n_embd"] == 768


def test_ranks_share_a_step(tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    made, _ = chosen(Settings(data="x", size=4), tokenizer_directory)
    assert (made.batch_size, made.micro_steps) == (16, 8), "the same 128 rows, a micro-step for each rank"


def test_without_a_size_nothing_changes(tokenizer_directory: Path) -> None:
    made, said = chosen(Settings(data="x", model=json.dumps(MODEL)), tokenizer_directory)
    assert (made.learning_rate, made.batch_size, made.micro_steps, said) == (1e-3, 16, 1, "")


def test_a_model_is_born_by_its_size(
    tokenizer_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"number {n} follows {n - 1}"}) for n in range(60)))
    given = Settings(data=str(text), size=1, steps=2, max_length=32, held_out=4, batch_size=2, micro_steps=1)
    record = causal(tokenizer_directory, tmp_path / "model", given)
    assert "size 1: 1 layers, width 128" in capsys.readouterr().err
    assert record.settings["learning_rate"] == chosen(given, tokenizer_directory)[0].learning_rate
    assert bildung.load(tmp_path / "model").config.hidden_size == 128
    assert causal(tokenizer_directory, tmp_path / "model", given) == record, "up to date"
    with pytest.raises(SettingsError, match="for a new model"):
        causal(tmp_path / "model", tmp_path / "other", given)
    with pytest.raises(SettingsError, match="at least 1"):
        causal(tokenizer_directory, tmp_path / "other", Settings(data=str(text), size=0))
    with pytest.raises(SettingsError, match="give the learning_rate"):
        causal(tokenizer_directory, tmp_path / "other", Settings(data=str(text), size=1, mup_width=64))

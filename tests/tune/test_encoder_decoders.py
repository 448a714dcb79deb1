"""Encoder-decoders are tuned on sources and targets, by the same operations as decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.core.errors import DataError, SettingsError
from bildung.data.seq2seq import SourceTarget, answered
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.model.virtual import remove_virtual
from bildung.tune.bitfit import Settings as Bitfit
from bildung.tune.bitfit import bitfit
from bildung.tune.dylora import Settings as Dylora
from bildung.tune.dylora import dylora
from bildung.tune.full import Settings as Full
from bildung.tune.full import full
from bildung.tune.ia3 import Settings as Ia3
from bildung.tune.ia3 import ia3
from bildung.tune.lora import Settings as Lora
from bildung.tune.lora import lora
from bildung.tune.merge import Settings as Merge
from bildung.tune.merge import fold_deltas, merge
from bildung.tune.prefix import Settings as Prefix
from bildung.tune.prefix import prefix
from bildung.tune.prompt import Settings as Prompt
from bildung.tune.prompt import prompt
from tests.contract.test_families import CONFIGS
from tests.model.tiny import tiny_lm
from tests.model.tiny_encoder import tiny_encoder

METHODS: dict[str, Any] = {
    "full": (full, Full, {}),
    "lora": (lora, Lora, {"rank": 4}),
    "dora": (lora, Lora, {"rank": 4, "dora": True}),
    "ia3": (ia3, Ia3, {"learning_rate": 0.1}),
    "dylora": (dylora, Dylora, {"rank": 4}),
    "bitfit": (bitfit, Bitfit, {"learning_rate": 0.1}),
    "prompt": (prompt, Prompt, {"text": "abc"}),
    "prefix": (prefix, Prefix, {"length": 3}),
}


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Sources and targets, and one conversation."""
    made = [{"source": f"what is {i}", "target": "abc"[i % 3] * 3} for i in range(11)]
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    made.append({"messages": [*talk, {"role": "assistant", "content": "aaa"}]})  # type: ignore[dict-item]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    return str(path)


def test_a_conversation_is_a_source_and_a_target(data: str) -> None:
    found = list(answered(data))
    assert found[0] == SourceTarget("what is 0", "aaa") and found[-1] == SourceTarget("Be short.\nHi", "aaa")


@pytest.mark.parametrize(
    "family, method",
    [
        *[("t5", method) for method in ("full", "lora", "ia3", "dylora")],
        *[("bart", method) for method in ("lora", "dora", "bitfit")],
        ("marian", "lora"), ("transformer", "lora"), ("rnn_seq2seq", "lora"),
    ],
)  # fmt: skip
def test_tuned_and_loaded(family: str, method: str, data: str, tmp_path: Path) -> None:
    config = from_dict({"model_type": family, **CONFIGS[family]})
    lm = LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config)
    source = bildung.save(lm, tmp_path / "source")
    operation, settings, options = METHODS[method]
    common = dict(data=data, steps=8, learning_rate=2e-2, precision="fp32", max_length=32, held_out=2)
    record = operation(source, tmp_path / "out", settings(**{**common, **options}))
    assert record.measured["loss_last"] < record.measured["loss_first"] - 0.1
    assert record.measured["examples"] == 10
    again = bildung.load(tmp_path / "out")
    tokens = torch.tensor([[40, 41, 42, 43]]), torch.tensor([[258, 60, 61]])
    with torch.no_grad():
        before, after = lm.model(*tokens), again.model(*tokens)
        assert (before - after).abs().max() > 1e-3
        fold_deltas(again.model, torch.float32)
        torch.testing.assert_close(again.model(*tokens), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_are_kept(method: str, data: str, tmp_path: Path) -> None:
    """Nothing else changes; a written prompt is where a decoder's prefix cannot start."""
    config = from_dict({"model_type": "t5", **CONFIGS["t5"]})
    lm = LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config)
    source = bildung.save(lm, tmp_path / "source")
    operation, settings, options = METHODS[method]
    common = dict(data=data, steps=2, precision="fp32", max_length=32)
    operation(source, tmp_path / "out", settings(**{**common, **options}))
    again = bildung.load(tmp_path / "out")
    assert again.added == ["virtual tokens"]
    tokens = torch.tensor([[40, 41, 42, 43]]), torch.tensor([[258, 60, 61]])
    with torch.no_grad():
        assert (lm.model(*tokens) - again.model(*tokens)).abs().max() > 1e-3
    remove_virtual(again.model)
    with torch.no_grad():
        torch.testing.assert_close(again.model(*tokens), lm.model(*tokens), atol=1e-5, rtol=1e-5)
    if method == "prefix":
        with pytest.raises(SettingsError, match="depend on the source"):
            operation(source, tmp_path / "text", settings(**common, init="text"))


def test_an_encoder_is_told_what_it_learns_from(data: str, tmp_path: Path) -> None:
    source = bildung.save(tiny_encoder("BertForPreTraining"), tmp_path / "source")
    with pytest.raises(DataError, match="does not continue text"):
        lora(source, tmp_path / "out", Lora(data=data, steps=1))


def test_an_adapter_of_an_encoder_decoder_is_merged(data: str, tmp_path: Path) -> None:
    config = from_dict({"model_type": "t5", **CONFIGS["t5"]})
    lm = LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config)
    source = bildung.save(lm, tmp_path / "source")
    lora(source, tmp_path / "out", Lora(data=data, steps=2, precision="fp32", max_length=32, rank=4, dora=True))
    record = merge(tmp_path / "out", tmp_path / "merged", Merge())
    assert record.measured["merged_matrices"] == 32
    tokens = torch.tensor([[40, 41, 42, 43]]), torch.tensor([[258, 60, 61]])
    with torch.no_grad():
        merged, adapted = (bildung.load(tmp_path / name).model(*tokens) for name in ("merged", "out"))
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)

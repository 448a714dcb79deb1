"""A recurrent model goes through the same operations as every other: tuned, merged, quantized, measured, talked to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import bildung
from bildung.align.dpo import Settings as Dpo
from bildung.align.dpo import dpo
from bildung.compress.quantize import Settings as Quantize
from bildung.compress.quantize import quantize
from bildung.evaluate.card import CardSettings
from bildung.evaluate.evaluate import Settings as Evaluate
from bildung.evaluate.evaluate import evaluate
from bildung.look.logit_lens import Settings as Lens
from bildung.look.logit_lens import logit_lens
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.run.chat import Settings as Chat
from bildung.run.chat import chat
from bildung.tune.full import Settings as Full
from bildung.tune.full import full
from bildung.tune.lora import Settings as Lora
from bildung.tune.lora import lora
from bildung.tune.merge import Settings as Merge
from bildung.tune.merge import merge
from tests.conftest import tiny_tokenizer

CARD = CardSettings(tasks=("capitals", "prose"), limit=3, sample_prompts=("Who?",), sample_tokens=4, context=64)


@pytest.mark.parametrize("cell", ["lstm", *(pytest.param(cell, marks=pytest.mark.slow) for cell in ("rnn", "gru"))])
def test_a_life(cell: str, tmp_path: Path) -> None:
    keys = {"model_type": "rnn", "cell": cell, "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}
    config = from_dict({**keys, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.5})
    bildung.save(LanguageModel(build(config, seed=3).eval(), tiny_tokenizer(), config), tmp_path / "base")
    talks = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ja"}]} for i in range(9)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    data = {"data": str(tmp_path / "talks.jsonl"), "steps": 4, "max_length": 64, "card": CARD, "held_out": 2}
    tuned = lora(tmp_path / "base", tmp_path / "lora", Lora(**data, rank=4, dropout=0.1))
    assert tuned.before["tasks"] and tuned.after["tasks"]
    merge(tmp_path / "lora", tmp_path / "merged", Merge(card=CARD))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        adapted = bildung.load(tmp_path / "lora", "float32").model(tokens)
        merged = bildung.load(tmp_path / "merged", "float32").model(tokens)
        base = bildung.load(tmp_path / "base", "float32").model(tokens)
    assert (adapted - merged).abs().max() < 1e-4 < (adapted - base).abs().max()
    full(tmp_path / "merged", tmp_path / "full", Full(**data, precision="bf16"))
    pairs = [{"prompt": f"{i}?", "chosen": "yes indeed", "rejected": "no"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    judged = {**data, "data": str(tmp_path / "pairs.jsonl"), "batch_size": 2}
    aligned = dpo(tmp_path / "merged", tmp_path / "dpo", Dpo(**judged))
    assert abs(aligned.measured["loss_at_start"] - math.log(2)) < 1e-4
    for method in ("int8", "nf4"):
        quantize(tmp_path / "merged", tmp_path / method, Quantize(method=method, card=CARD))
    assert evaluate(tmp_path / "nf4", tmp_path / "measured", Evaluate(card=CARD)).after["tasks"]["prose"]["value"] > 0
    chat(tmp_path / "nf4", tmp_path / "talk", Chat(prompts=("Hello!", "And you?"), new_tokens=4))
    logit_lens(tmp_path / "full", tmp_path / "lens", Lens(prompt="the cat", against=tmp_path / "base"))
    assert json.loads((tmp_path / "lens/lens.json").read_text())["a"]["rank"][-1] == [1] * len(
        json.loads((tmp_path / "lens/lens.json").read_text())["labels"]
    )

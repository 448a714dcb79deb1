"""What each rank of test_tensor_parallel.py runs: the same training with whole and with cut matrices; rank 0 saves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bildung.core import ranks
from bildung.core.errors import DataError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import match_linears, replace_stores
from bildung.model.low_rank import LowRank, principal
from bildung.model.quantized import METHODS
from bildung.model.taps import intervene
from bildung.run.loop import decode
from bildung.train import objectives
from bildung.train.fit import fit
from bildung.train.objectives import clm, token_logprobs
from bildung.train.optim import adamw, cosine
from bildung.train.parallel import Parallel
from bildung.train.shards import held_bytes, is_shard, whole
from tests.train.parallel_run import KEYS, micro_batch

LLAMA: dict[str, Any] = {**KEYS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 2}
SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 2}
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 24, "n_head": 4, "n_layer": 2}
GPT2 |= {"n_positions": 64, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3"},
    "gemma3_text": {**LLAMA, "model_type": "gemma3_text"},
    "gpt2": {**GPT2, "attn_pdrop": 0.0},
    "gpt_neox": {**SIZES, "model_type": "gpt_neox", "rotary_pct": 0.7, "max_position_embeddings": 64},
    "int8": WIDE,
    "nf4": WIDE,
    "recompute": {**GPT2, "attn_pdrop": 0.0},
    "dropout": {**GPT2, "attn_pdrop": 0.5},
}
WITH_DELTAS = ("llama", "gpt2", "int8", "nf4", "pissa")
CASES = [*(name for name in MODELS if name not in METHODS), *(f"{name} lora" for name in WITH_DELTAS)]
MORE = ("qwen2", "qwen3", "gemma3_text", "recompute", "llama lora", "pissa lora")  # for make test-all
RESUMED = ("llama", "gpt2 lora")  # by one process: 61 words in parts of 31 and 30, and cut deltas
STEPS, MICRO_STEPS = 3, 2


def model_of(case: str) -> torch.nn.Module:
    name, _, lora = case.partition(" ")
    model = build(from_dict(MODELS.get(name, LLAMA)), seed=3)
    if name in METHODS:
        replace_stores(model, "all", lambda linear: METHODS[name].quantize(linear.base.dense()))
    for block in model.model.layers:
        block.recompute = "blocks" if name == "recompute" else "none"
    if lora:
        model.requires_grad_(False)
        for number, linear in enumerate(match_linears(model, "all").values()):
            generator = torch.Generator().manual_seed(number)
            delta = LowRank(linear.in_features, linear.out_features, 2, 1.0, generator=generator)
            torch.nn.init.normal_(delta.lora_B, std=0.3, generator=generator)
            if name == "pissa":
                delta.start_at(*principal(linear.base.dense(), 2))
            linear.deltas["x"] = delta
    return model


def train(case: str, kind: str, out: Path | None = None, steps: int = STEPS) -> tuple[torch.nn.Module, dict[str, Any]]:
    """eps is larger than usual: of a gradient that is 0 but for rounding (k's bias) Adam would make a whole step."""
    model = model_of(case)
    parallel = Parallel(kind, model, clm)
    optimizer = parallel.optimizer(lambda: adamw(model, 1e-2, weight_decay=0.1, eps=1e-3))
    given: dict[str, Any] = dict(steps=steps, micro_steps=MICRO_STEPS, schedule=cosine(STEPS), clip=0.5)
    given |= dict(out=out, checkpoint_every=2 if out else 0, parallel=parallel)
    history = fit(model, micro_batch, clm, optimizer, **given)
    measured: dict[str, Any] = {name: [row[name] for row in history.rows] for name in ("loss", "grad_norm")}
    measured["held"] = held_bytes(model, optimizer)
    # What is not cut must be the same on all ranks to the last bit, or they drift apart.
    common = [p.detach().flatten() for p in model.parameters() if p.requires_grad and not is_shard(p)]
    measured["in_step"] = len(set(ranks.gathered(torch.cat(common).numpy().tobytes()))) == 1
    parallel.finish()
    return model, measured


def main(out: Path) -> None:
    kind = "tensor" if ranks.world_size() > 1 else "none"
    compared(out, [case for case in CASES if case not in MORE], kind)
    for case in WORDS:
        found = words(case, kind)
        if ranks.rank() == 0:
            save_file(found, out / f"{kind} words {case}.safetensors")
    if kind == "none":
        train("llama", "none", out / "one then two", steps=2)
        return
    for case in RESUMED:
        train(case, kind, out / f"two then one {case}", steps=2)
    model, _ = train("llama", kind, out / "one then two")
    if ranks.rank() == 0:
        save_file(weights(model), out / "resumed.safetensors")


def more(out: Path) -> None:
    compared(out, MORE, "tensor" if ranks.world_size() > 1 else "none")


def compared(out: Path, cases: Iterable[str], kind: str) -> None:
    """Trains each case; what rank 0 ends with is kept."""
    for case in cases:
        model, measured = train(case, kind)
        if ranks.rank() == 0:
            save_file(weights(model), out / f"{kind} {case}.safetensors")
            (out / f"{kind} {case}.json").write_text(json.dumps(measured))


WORDS: dict[str, dict[str, Any]] = {
    "tied": LLAMA,
    "untied": {**LLAMA, "tie_word_embeddings": False},
    "capped": {**LLAMA, "model_type": "gemma3_text", "final_logit_softcapping": 0.7},
    "scaled": {**SIZES, "model_type": "bildung", "logit_scale": 0.4, "embed_scale": 3.0, "tie_word_embeddings": False},
    "delta": LLAMA,
    "int8": {**LLAMA, "tie_word_embeddings": False},
    "bfloat16": LLAMA,
    "heard": LLAMA,
}
FINE = ("tied", "untied", "scaled")  # chunks of three rows of logits


def words(case: str, kind: str) -> dict[str, torch.Tensor]:
    """What a model of 61 words says of a batch: losses, gradients of everything that trains, logits, an answer."""
    model = build(from_dict(WORDS[case]), seed=3)
    if case == "scaled":
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 61))
    if case == "delta":
        model.requires_grad_(False)
        delta = LowRank(24, 61, 2, 1.0, 0.3, generator=torch.Generator().manual_seed(1))
        torch.nn.init.normal_(delta.lora_B, std=0.3, generator=torch.Generator().manual_seed(2))
        model.lm_head.deltas["x"] = delta
    if case == "int8":
        model.lm_head.base = METHODS["int8"].quantize(model.lm_head.base.dense())
    model.compute_dtype = torch.bfloat16 if case == "bfloat16" else None
    parallel = Parallel(kind, model, clm)
    batch = micro_batch(0)
    found = {}
    elements = objectives.CHUNK_ELEMENTS["cpu"]
    objectives.CHUNK_ELEMENTS["cpu"] = 3 * (31 if kind == "tensor" else 61) if case in FINE else elements
    listen = {"logits": lambda logits: 1.5 * logits - logits.mean(-1, keepdim=True) ** 2} if case == "heard" else {}
    with intervene(model, listen):
        for name, smoothing in (("sum", 0.0), ("smoothed", 0.3), ("rows", 0.0)):
            torch.manual_seed(5)
            model.zero_grad()
            if name == "rows":
                loss = (token_logprobs(model, batch) * torch.tensor([0.5, -2.0])).sum()
            else:
                loss = clm(model, batch, smoothing).total
            loss.backward()
            trained = [(path, p) for path, p in model.named_parameters() if p.requires_grad]
            found |= {f"{name} {path}": whole(p.grad).clone() for path, p in trained} | {name: loss.detach()}
        with torch.no_grad():
            found["measured"] = clm(model, batch).total
            found["logits"] = model(batch.tokens_BL)
    answers = decode(model, [[5, 6, 7], [8, 9]], new_tokens=8)
    for nobodys in (-1, 61):  # before any exchange, on all ranks
        with pytest.raises(DataError, match=f"id {nobodys} was given; this table has 61 rows"):
            model(torch.tensor([[3, nobodys, 40]]))
    found["answers"] = torch.tensor([answer.tokens for answer in answers])
    objectives.CHUNK_ELEMENTS["cpu"] = elements
    parallel.finish()
    assert not case.startswith("tied") or model.lm_head.base.weight is model.model.embed_tokens.weight
    found["again"] = model(batch.tokens_BL).detach()
    return found


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and what quantized stores hold."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers() if ".base." in name}

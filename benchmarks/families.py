"""A forward pass and a training step of every family, against transformers, on one config in one run.

    python benchmarks/families.py [--families llama bert ...] [--rounds 5] [--dtype float32] [--threads 2]

Random weights of middle size (6 layers, 384 wide), 4 rows of 256 tokens (a ViT: 8 images of 224 pixels), the same
weights on both sides, eager mode. The two take turns within one process, so that a slow second hits both; a ratio is
formed per round, and the median is shown with the least and the greatest. The training step is forward, cross-entropy
over all positions (the peer's own loss where it has one), backward, AdamW; ours goes through the same objective as
`bildung pretrain`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import bildung.model.store as store
from bildung.data.batches import Example, pad
from bildung.model.config import read_config
from bildung.model.safetensors_file import read_tensors
from bildung.train.objectives import clm
from bildung.train.optim import adamw

ROWS, LENGTH, VOCAB = 4, 256, 8192
COMMON = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024)
LLAMA = dict(COMMON, vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=512)
VISION = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, mlp_ratio=3)
BART = dict(d_model=384, encoder_layers=3, decoder_layers=3, encoder_attention_heads=6, decoder_attention_heads=6)
BART |= dict(encoder_ffn_dim=1024, decoder_ffn_dim=1024, vocab_size=VOCAB, max_position_embeddings=512)

# family -> (configuration class, model class, its keys)
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(LLAMA, head_dim=64)),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(LLAMA, head_dim=64, sliding_window=128)),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(n_embd=384, n_layer=6, n_head=6, vocab_size=VOCAB, n_positions=512)),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", dict(COMMON, vocab_size=VOCAB)),
    "bert": ("BertConfig", "BertForMaskedLM", dict(COMMON, vocab_size=VOCAB)),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", dict(COMMON, vocab_size=VOCAB)),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        dict(dim=384, n_layers=6, n_heads=6, hidden_dim=1024, vocab_size=VOCAB),
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        dict(d_model=384, num_layers=3, num_heads=6, d_kv=64, d_ff=1024, vocab_size=VOCAB, decoder_start_token_id=0),
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "marian": ("MarianConfig", "MarianMTModel", dict(BART, pad_token_id=0, decoder_start_token_id=0)),
    "vit": ("ViTConfig", "ViTForImageClassification", COMMON),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", VISION),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    for family in given.families:
        found = measure(family, getattr(torch, given.dtype), given.rounds)
        print(f"{family:12} " + "  ".join(found), f" load {os.getloadavg()[0]:.1f}", flush=True)


def measure(family: str, dtype: torch.dtype, rounds: int) -> list[str]:
    """The ratios of a family in words: peer's seconds / ours, of a forward pass and a training step."""
    peer, ours = pair(family, dtype)
    inputs = inputs_of(family, peer, dtype)
    with torch.no_grad():
        far = float((forward(ours, inputs) - forward_peer(peer, inputs)).abs().max())
    assert dtype != torch.float32 or far < 1e-3, f"{family}: the two models differ by {far}"
    said = []
    with torch.no_grad():
        peer.eval(), ours.eval()
        said.append(f"forward {ratio(lambda: forward(ours, inputs), lambda: forward_peer(peer, inputs), rounds)}")
    peer.train(), ours.train()
    steps = [stepper(lambda: loss(ours, inputs), ours), stepper(lambda: loss_peer(peer, inputs), peer)]
    said.append(f"training step {ratio(*steps, rounds)}")
    return said


def pair(family: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(peer, ours) with the same weights, dropout off."""
    config_class, model_class, keys = PEERS[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**keys)
    for name in vars(config):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    peer = getattr(transformers, model_class)._from_config(config, dtype=dtype).eval()
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        path = Path(directory)
        ours = store.assemble(read_config(path), dict(read_tensors(path)))
    return peer, ours.requires_grad_(True)


def inputs_of(family: str, peer: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random pixels, tokens, or a source and a target."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)
    if family in ("vit", "dinov2"):
        pixels = torch.randn(2 * ROWS, 3, peer.config.image_size, peer.config.image_size, generator=generator)
        return {"pixels": pixels.to(dtype)}
    return {"source": tokens, "tokens": tokens.roll(7, 1)} if family in ("t5", "bart", "marian") else {"tokens": tokens}


def forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Our logits."""
    if "pixels" in inputs:
        return model(inputs["pixels"])
    if "source" in inputs:
        return model(inputs["source"], inputs["tokens"])
    return model(inputs["tokens"])


def forward_peer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The peer's logits."""
    if "pixels" in inputs:
        return model(pixel_values=inputs["pixels"]).logits
    if "source" in inputs:
        return model(input_ids=inputs["source"], decoder_input_ids=inputs["tokens"], use_cache=False).logits
    return model(input_ids=inputs["tokens"], **({"use_cache": False} if not hasattr(model, "cls") else {})).logits


def loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Our mean loss: for what predicts the next token, the objective of pretraining."""
    if "pixels" in inputs or model.config.kind == "encoder":
        return _mean(forward(model, inputs), inputs)
    model = model.given(inputs["source"]) if "source" in inputs else model
    rows = inputs["tokens"].tolist()
    found = clm(model, pad([Example(row, [False] + [True] * (len(row) - 1)) for row in rows], None))
    return found.total / found.count


def loss_peer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The same of the peer's logits: the next token for what predicts it, the token itself for encoders."""
    logits = forward_peer(model, inputs)
    if "pixels" not in inputs and not model.__class__.__name__.endswith("MaskedLM"):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs["tokens"][:, 1:].flatten())
    return _mean(logits, inputs)


def _mean(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    if "pixels" in inputs:
        return F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long))
    return F.cross_entropy(logits.flatten(0, 1).float(), inputs["tokens"].flatten())


def stepper(mean: Callable[[], Tensor], model: Any) -> Callable[[], None]:
    """A training step: forward, backward, AdamW."""
    optimizer = adamw(model, 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        mean().backward()
        optimizer.step()

    return step


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> str:
    """Median of (their seconds / our seconds) over rounds in which they take turns, with the range."""
    ours(), theirs()
    found = []
    for _ in range(rounds):
        times = []
        for work in (ours, theirs):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        found.append(times[1] / times[0])
    return json.dumps({"x": round(statistics.median(found), 2), "range": [round(min(found), 2), round(max(found), 2)]})


if __name__ == "__main__":
    main()

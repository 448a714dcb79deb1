"""QLoRA against LoRA: held-out loss and bytes of the base, on one model and the same data, over several seeds.

    python benchmarks/qlora.py MODEL_DIRECTORY --data nursery:alpaca [--steps 60] [--seeds 3]
    python benchmarks/qlora.py nursery/minilm --classify --data nursery:imdb/train --limit 6000 --steps 250

Claim to check: QLoRA's held-out loss within 2 % of LoRA's, at a quarter of the base's memory. Both train with the
settings of the QLoRA paper (bildung/tune/qlora.py); LoRA over the model in bfloat16, QLoRA over it in NF4 with double
quantization. "from the error" is QLoRA whose A and B start as what quantization took (bildung/tune/qera.py). As B is
not 0 there, it can learn faster for that alone: PiSSA, a LoRA whose B is not 0 either, stands beside it.

With --classify: `tune classify --method lora` with these settings, of an encoder or a decoder: over the model, and over
it in NF4.

Bytes are of the matrices that are quantized: embeddings stay as they are in both, and are a fifth of a small model.
Times mean nothing here: the runs come one after the other, each once.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bildung
from bildung.compress.quantize import Settings as Quantize
from bildung.compress.quantize import quantize
from bildung.core.record import Record
from bildung.core.settings import as_dict, resolve
from bildung.model.linear import Dense
from bildung.tune.classify import Settings as Classify
from bildung.tune.classify import classify
from bildung.tune.lora import Options, lora
from bildung.tune.lora import Settings as Lora
from bildung.tune.qlora import Settings as QLora
from bildung.tune.qlora import qlora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="nursery:alpaca")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--limit", type=int, default=None, help="conversations")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4, help="rows a micro-step, of 16 a step")
    parser.add_argument("--classify", action="store_true", help="a classifier of labelled texts")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as place:
        compare(given, Path(place))


def compare(given: argparse.Namespace, place: Path) -> None:
    """Print the held-out loss of each seed and method, and the bytes of their bases."""
    quantize(given.model, place / "nf4", Quantize(method="nf4"))
    quantized = [name for name, one in linears(place / "nf4").items() if not isinstance(one.base, Dense)]
    dense = matrix_bytes(given.model, quantized)
    packed = matrix_bytes(place / "nf4", quantized)
    found: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        for name, train in (classifiers if given.classify else writers)(given, place, seed).items():
            record = train()
            found.setdefault(name, []).append(record.measured["held_out_loss_last"])
            told = f", accuracy {record.measured['accuracy']:.4f}" if given.classify else ""
            print(
                f"seed {seed}  {name:20} held-out loss {record.measured['held_out_loss_first']:.4f} -> "
                f"{record.measured['held_out_loss_last']:.4f}{told}   peak {record.peak_bytes / 1e6:.0f} MB",
                flush=True,
            )
    for name in list(found)[1:]:
        ratios = [ours / theirs for ours, theirs in zip(found[name], found["lora"], strict=True)]
        spread = statistics.stdev(ratios) if len(ratios) > 1 else float("nan")
        print(f"{name} / lora held-out loss: {statistics.mean(ratios):.4f} (standard deviation {spread:.4f})")
    print(
        f"matrices of the base: {dense / 1e6:.1f} MB -> {packed / 1e6:.1f} MB, {packed / dense:.3f} of it; "
        f"{8 * packed / sum(elements(given.model, quantized)):.3f} bits per weight"
    )


def writers(given: argparse.Namespace, place: Path, seed: int) -> dict[str, Callable[[], Record]]:
    """{method: its training} on conversations."""
    published = QLora(**common(given, seed), rank=given.rank)
    reconstructed = dataclasses.replace(published, reconstruct=given.model)
    own = {field.name for field in dataclasses.fields(Lora)}
    same = resolve(Lora, {name: value for name, value in as_dict(published).items() if name in own})
    pissa = dataclasses.replace(same, initialise="pissa")
    return {
        "lora": partial(lora, given.model, place / f"lora{seed}", same),
        "lora pissa": partial(lora, given.model, place / f"pissa{seed}", pissa),
        "qlora": partial(qlora, place / "nf4", place / f"qlora{seed}", published),
        "qlora from the error": partial(qlora, place / "nf4", place / f"qera{seed}", reconstructed),
    }


def classifiers(given: argparse.Namespace, place: Path, seed: int) -> dict[str, Callable[[], Record]]:
    """{method: its training} on labelled texts."""
    published = QLora(data=given.data)
    names = ("learning_rate", "schedule", "warmup", "clip", "optimizer", "weight_decay")
    taken = {name: getattr(published, name) for name in names}
    options = Options(rank=given.rank, alpha=published.alpha, dropout=published.dropout)
    settings = Classify(**common(given, seed), **taken, method="lora", lora=options)
    return {
        "lora": partial(classify, given.model, place / f"lora{seed}", settings),
        "qlora": partial(classify, place / "nf4", place / f"qlora{seed}", settings),
    }


def common(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What all are told."""
    return dict(
        data=given.data, steps=given.steps, held_out=given.held_out, evaluate_every=given.steps, seed=seed,
        limit=given.limit, max_length=given.max_length, batch_size=given.batch_size,
        micro_steps=16 // given.batch_size,
    )  # fmt: skip


def linears(path: Path) -> dict[str, Any]:
    """The matrices of a directory, in bfloat16 where they are dense."""
    found: dict[str, Any] = bildung.load(path, torch.bfloat16).model.linears()
    return found


def matrix_bytes(path: Path, names: list[str]) -> int:
    """Bytes of the named matrices as they are held in memory."""
    there = linears(path)
    return sum(there[name].base.stored_bytes for name in names)


def elements(path: Path, names: list[str]) -> list[int]:
    """How many numbers each has."""
    there = linears(path)
    return [there[name].in_features * there[name].out_features for name in names]


if __name__ == "__main__":
    main()

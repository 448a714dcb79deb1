"""DyLoRA against LoRA, rank by rank: held-out loss of every rank that is cut out of each.

    python benchmarks/dylora.py MODEL_DIRECTORY --data nursery:alpaca [--rank 8] [--steps 120] [--seeds 3]

Claim to check (Valipour et al. 2023): one DyLoRA serves all ranks, while a LoRA serves the rank it was trained at. The
same data, steps, alpha and learning rate for both; each is cut by `bildung tune cut`. The last column is a LoRA trained
at that rank alone, what DyLoRA spares: only with --search, for it takes a run per rank.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import bildung
from bildung.model.store import LanguageModel
from bildung.train.fit import mean_loss
from bildung.tune.cut import Settings as Cut
from bildung.tune.cut import cut
from bildung.tune.dylora import Settings as DyLoRA
from bildung.tune.dylora import dylora
from bildung.tune.instruction import prepare
from bildung.tune.lora import Settings as Lora
from bildung.tune.lora import lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="nursery:alpaca")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--search", action="store_true", help="train a LoRA of each rank, too")
    given = parser.parse_args()
    found: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=".") as place:
        for seed in range(given.seeds):
            for name, losses in one_seed(given, seed, Path(place, str(seed))).items():
                for rank, loss in losses.items():
                    found.setdefault(name, {}).setdefault(rank, []).append(loss)
    print(f"held-out nats per answer token, mean of {given.seeds} seeds (standard error)")
    print("rank  " + "  ".join(f"{name:>20}" for name in found))
    for rank in range(1, given.rank + 1):
        print(f"{rank:4}  " + "  ".join(f"{shown(losses.get(rank, [])):>20}" for losses in found.values()))


def one_seed(given: argparse.Namespace, seed: int, place: Path) -> dict[str, dict[int, float]]:
    """{adapter: {rank: loss}}; rank 0 of the base."""
    place.mkdir()
    common: dict[str, Any] = dict(
        data=given.data, steps=given.steps, held_out=given.held_out, max_length=given.max_length, seed=seed,
        alpha=2.0 * given.rank, micro_steps=2,
    )  # fmt: skip
    dylora(given.model, place / "dylora", DyLoRA(**common, rank=given.rank))
    lora(given.model, place / "lora", Lora(**common, rank=given.rank))
    found: dict[str, dict[int, float]] = {"DyLoRA, cut": {}, f"LoRA {given.rank}, cut": {}}
    for rank in range(1, given.rank + 1):
        for name, source in zip(found, ("dylora", "lora"), strict=True):
            out = place / f"{source}-{rank}"
            cut(place / source, out, Cut(rank=rank))
            found[name][rank] = held_out_loss(out, Lora(**common))
    if given.search:
        for rank in range(1, given.rank + 1):
            lora(given.model, place / f"alone-{rank}", Lora(**{**common, "alpha": 2.0 * rank}, rank=rank))
            found.setdefault("LoRA of that rank", {})[rank] = held_out_loss(place / f"alone-{rank}", Lora(**common))
    for name, losses in found.items():
        print(f"seed {seed}  {name:20} " + "  ".join(f"{loss:.4f}" for loss in losses.values()), flush=True)
    return found


def held_out_loss(adapter: Path, settings: Lora) -> float:
    """Nats per answer token on what was kept out of training."""
    lm: LanguageModel = bildung.load(adapter)
    lm.model.compute_dtype = torch.bfloat16
    data = prepare(lm.tokenizer, settings)
    return mean_loss(lm.model, data.objective, data.held_out)["loss"]


def shown(losses: list[float]) -> str:
    """Mean and standard error."""
    if len(losses) < 2:
        return f"{losses[0]:.4f}" if losses else "-"
    return f"{statistics.mean(losses):.4f} ({statistics.stdev(losses) / len(losses) ** 0.5:.4f})"


if __name__ == "__main__":
    main()

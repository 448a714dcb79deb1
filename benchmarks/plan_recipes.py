"""What `bildung live` predicts of every step of every shipped recipe, and what each takes: the table of docs/log.md.

    python -m benchmarks.plan --recipes [--steps 3] [--only smollm2 induction]

Each recipe is lived in a process of its own, as on the command line, into a directory that is thrown away; predicted
and measured peaks are those of its records. What is cut, so that it takes minutes: trainings have `--steps` steps, are
measured after each, and answer few questions; a card asks few; and what CUT says. All else is the recipe's: models,
data, batches, lengths, optimizers.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bildung.core.recipe import Recipe, Step, read_recipe
from bildung.core.record import Record, read_record

RECIPES = tuple(sorted(path.stem for path in Path("recipes").glob("*.yaml")))
QUESTIONS = 8  # of each task of a card
OFTEN = ("evaluate_every", "induction_every")  # every so many steps
CUT: Mapping[str, Mapping[str, Any]] = {
    "gpt2_124m/tokens": {"data": "nursery:brown", "limit": 500, "held_out": 5},  # 2.5 million documents of the hub
    "gpt2_124m/model": {  # 16 rows of 1,024, hundreds of them a step, on eight GPUs
        "max_length": 256,
        "batch_size": 2,
        "micro_steps": 1,
        "parallel": "none",
        "held_out_tokens": 2_000,
    },
    "generative_discriminative/curve": {"sizes": [8, 64], "rounds": 1, "test_limit": 64},  # up to 19,800, three draws
    "self_instruct/written": {"instructions": 4},  # 100
    "self_instruct/tuned": {"held_out": 1, "card": {"limit": QUESTIONS}},  # 10
    "tuning_methods/compared": {"limit": 72, "methods": ["lora", "prefix:init=random", "adapter:kind=parallel"]},  # 9
}


def table(steps: int, only: list[str] | None) -> None:
    """Live them one after the other and print a line for each step."""
    print(f"{'step':36}{'predicted':>10}{'measured':>10}{'':>8}   parts, MB", flush=True)
    for title in only or RECIPES:
        with tempfile.TemporaryDirectory(dir=".", prefix=".plan-") as place:
            code = f"from benchmarks.plan_recipes import lived; lived({title!r}, {place!r}, {steps})"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            for step in shortened(title, Path(place), steps).steps:
                record = read_record(step.out) if step.out.exists() else None
                print(line(f"{title}/{step.name}", record), flush=True)
            if done.returncode:
                print(f"{title} ended with: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}", flush=True)


def line(name: str, record: Record | None) -> str:
    """Predicted and measured peaks in MB, how far off the prediction is, and its parts."""
    if record is None:
        return f"{name:36} was not made"
    if (predicted := record.measured.get("predicted_peak_bytes")) is None:
        return f"{name:36}{'none':>10}{record.peak_bytes / 1e6:10,.0f}{'':>8}   {'; '.join(record.notes)}"
    found: dict[str, int] = record.measured["predicted_parts"]
    parts = ", ".join(f"{part} {count / 1e6:.0f}" for part, count in found.items() if count > 5e5)
    off = predicted / record.peak_bytes - 1
    return f"{name:36}{predicted / 1e6:10,.0f}{record.peak_bytes / 1e6:10,.0f}{off:+8.1%}   {parts}"


def lived(title: str, place: str, steps: int) -> None:
    """Live a recipe, cut short, in this process."""
    from bildung.app.live import live

    live(shortened(title, Path(place), steps))


def shortened(title: str, place: Path, steps: int) -> Recipe:
    """A shipped recipe with few steps of training, to be made in another place."""
    recipe = read_recipe(Path("recipes") / f"{title}.yaml")

    def moved(value: Any) -> Any:
        if isinstance(value, str | Path) and Path(value).parent == recipe.out:
            return type(value)(place / Path(value).name)
        if isinstance(value, list):
            return [moved(one) for one in value]
        return {name: moved(one) for name, one in value.items()} if isinstance(value, dict) else value

    made = [
        dataclasses.replace(
            step,
            source=moved(step.source),
            out=place / step.name,
            given=moved(cut(title, step, steps)),
            defaults=step.defaults | ({"card": {"limit": QUESTIONS}} if "card" in step.defaults else {}),
        )
        for step in recipe.steps
    ]
    return dataclasses.replace(recipe, out=place, steps=tuple(made))


def cut(title: str, step: Step, steps: int) -> dict[str, Any]:
    """A step's settings, with those that make it short."""
    from bildung.train.training import Training

    given = dict(step.given)
    if issubclass(step.verb.load().Settings, Training) or "steps" in given:
        given.pop("epochs", None)
        given["steps"] = min(steps, given.get("steps", steps))
        given |= {name: 1 for name in OFTEN if name in given}
        given |= {"answers": 64} if "answers" in given else {}
    return given | json.loads(json.dumps(CUT.get(f"{title}/{step.name}", {})))

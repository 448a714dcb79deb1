"""What is predicted before a run and what is measured after it, on the shipped recipes' steps that train, made short.

    python -m benchmarks.plan MODEL_DIRECTORY [--steps 3] [--only smollm2/tuned-lora bert_tiny/base]

MODEL_DIRECTORY (SmolLM2-135M-Instruct, adopted) stands for the steps of smollm2.yaml and qlora.yaml that start from a
model; vocabularies are learned first. Batches, lengths, optimizers and checkpoints are the recipes'; cards are left
out. Each step runs in a process of its own, as on the command line.

    python -m benchmarks.plan MODEL_DIRECTORY --looks [--only attention probe] [--adapter LORA]

The same of operations that do not train (benchmarks/plan_looks.py).

    python -m benchmarks.plan --recipes [--steps 3] [--only smollm2 induction]

Every step of every shipped recipe, lived (benchmarks/plan_recipes.py).

The measured peak is that of the whole operation, baselines and figures after training included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import plan_looks, plan_recipes
from bildung.core.recipe import Recipe, Step, read_recipe
from bildung.core.settings import resolve

MODELS = ("smollm2", "qlora")  # recipes whose steps start from MODEL_DIRECTORY
STEPS = (
    "smollm2/tuned-lora smollm2/aligned-lora smollm2/tuned-full language_models/rnn language_models/lstm "
    "language_models/transformer language_models/lstm-bptt bert_tiny/base bert_tiny/sentiment transformer_g2p/model "
    "rnn_g2p/luong vit_mnist/vit nursery/model characters/model"
).split()
FULL = {"data": "nursery:alpaca", "batch_size": 4, "max_length": 512, "held_out": 24, "checkpoint_every": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="these alone; default: all")
    parser.add_argument("--looks", action="store_true", help="operations that do not train")
    parser.add_argument("--recipes", action="store_true", help="shipped recipes, each as a whole")
    parser.add_argument("--adapter", type=Path, help="a LoRA on the model, for those that take two")
    parser.add_argument("--one", help="run this step here and print its figures")
    parser.add_argument("--place", type=Path, help="where its directories are made")
    given = parser.parse_args()
    if given.recipes:
        plan_recipes.table(given.steps, given.only)
        return
    if given.model is None:
        parser.error("give the directory of a model")
    if given.looks:
        plan_looks.table(given.model, given.adapter, given.only)
        return
    if given.one:
        print(json.dumps(one(given.one, given.model, given.steps, given.place)))
        return
    print(f"{'step':28}{'predicted':>11}{'measured':>11}{'':>8}   parts, MB")
    with tempfile.TemporaryDirectory(dir=".", prefix=".plan-") as place:
        for name in given.only or STEPS:
            command = [sys.executable, "-m", "benchmarks.plan", str(given.model), "--steps", str(given.steps)]
            done = subprocess.run([*command, "--one", name, "--place", place], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name:28} failed", flush=True)
                continue
            print(line(name, json.loads(done.stdout.splitlines()[-1])), flush=True)


def line(name: str, found: dict[str, Any]) -> str:
    """Predicted and measured peaks in MB, and how far off the prediction is."""
    predicted, measured = found["predicted"], found["measured"]
    parts = ", ".join(f"{part} {bytes_ / 1e6:.0f}" for part, bytes_ in found["parts"].items() if bytes_ > 5e5)
    return f"{name:28}{predicted / 1e6:11,.0f}{measured / 1e6:11,.0f}{predicted / measured - 1:+8.1%}   {parts}"


def one(name: str, model: Path, steps: int, place: Path) -> dict[str, Any]:
    """Make one step of a recipe and what it starts from; its figures."""
    title, _, step_name = name.partition("/")
    recipe = read_recipe(Path("recipes") / f"{title}.yaml")
    if step_name == "tuned-full":
        record = _run(
            recipe.step("tuned-lora"), model, place / title / step_name, {**FULL, "steps": steps}, "tune full"
        )
    else:
        step = recipe.step(step_name)
        source = model if title in MODELS else _made(recipe, step, place / title, steps)
        record = _run(step, source, place / title / step_name, {**step.given, "steps": steps})
    return {
        "predicted": record.measured["predicted_peak_bytes"],
        "measured": record.peak_bytes,
        "parts": record.measured["predicted_parts"],
    }


def _made(recipe: Recipe, step: Step, place: Path, steps: int) -> Any:
    """What the step starts from, made in another process: this one's memory is to be the step's alone."""
    if not isinstance(step.source, Path) or step.source.parent != recipe.out:
        return step.source
    before = recipe.step(step.source.name)
    out = place / before.name
    if not out.exists():
        code = f"from benchmarks.plan import make; make({recipe.name!r}, {before.name!r}, {str(place)!r}, {steps})"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return out


def make(title: str, name: str, place: str, steps: int) -> None:
    """Make a step of a recipe, short if it trains, and what it starts from."""
    recipe = read_recipe(Path("recipes") / f"{title}.yaml")
    step = recipe.step(name)
    given = {**step.given, "steps": steps} if "steps" in step.given else step.given
    _run(step, _made(recipe, step, Path(place), steps), Path(place) / name, given)


def _run(step: Step, source: Any, out: Path, given: dict[str, Any], verb: str | None = None) -> Any:
    from bildung.core.verbs import find, verbs

    module = find(verb, verbs()).load() if verb else step.verb.load()
    function = getattr(module, module.__name__.rpartition(".")[2])
    defaults = {name: value for name, value in step.settings(module.Settings).items() if name == "seed"}
    return function(source, out, resolve(module.Settings, {**defaults, **given}), force=out.exists())


if __name__ == "__main__":
    main()

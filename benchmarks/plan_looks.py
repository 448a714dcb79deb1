"""What `bildung plan` predicts of operations that do not train, and what they take: the table of docs/log.md.

    python -m benchmarks.plan MODEL_DIRECTORY --looks [--only patch probe] [--adapter LORA]

Each operation runs on the command line, in a process of its own; its plan in another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT = "When Mary and John went to the store, John gave a drink to"
LONG = " ".join(["The ship sailed on through the night, and nobody on board knew where the captain meant to go."] * 12)
OPERATIONS: dict[str, tuple[str, dict[str, str]]] = {  # a name: the verb, and its settings
    "attention": ("look attention", {"prompt": LONG, "max_tokens": "512"}),
    "attention, two": ("look attention", {"prompt": PROMPT, "against": "@adapter"}),
    "logit_lens": ("look logit_lens", {"prompt": PROMPT}),
    "saliency": ("look saliency", {"prompt": PROMPT}),
    "attribution": ("look attribution", {"prompt": PROMPT}),
    "trace": ("look trace", {"prompt": "The capital of France is", "subject": "France", "sites": "resid_post"}),
    "patch": ("look patch", {"count": "8", "attribution": ""}),
    "path_patch": ("look path_patch", {"count": "8"}),
    "circuit": ("look circuit", {"count": "8", "method": "eap", "edges": "100", "knockouts": "1"}),
    "probe": ("look probe", {"data": "nursery:brown", "limit": "100", "seeds": "1", "probes": "linear"}),
    "cache": ("look cache", {"data": "nursery:imdb", "limit": "60", "sites": "layers.*.resid_post"}),
    "tuned_lens": ("look tuned_lens", {"data": "nursery:brown", "steps": "3", "held_out": "2"}),
    "heads": ("look heads", {}),
    "circuits": ("look circuits", {}),
    "induction": ("look induction", {"rows": "4"}),
    "by_position": ("look by_position", {"data": "nursery:sotu", "rows": "16", "trained": "128"}),
    "stream_map": ("look stream_map", {"data": "nursery:brown", "pieces": "40", "layers": "5 10"}),
    "compare": ("look compare", {"prompt": PROMPT, "against": "@adapter", "sites": "resid_post", "columns": "8"}),
    "patchscope": ("look patchscope", {"prompt": PROMPT, "step": "6", "new_tokens": "4"}),
    "tune combine": ("tune combine", {"adapters": "@adapter @adapter"}),
}


def table(model: Path, adapter: Path | None, only: list[str] | None) -> None:
    """Run them one after the other and print a line each."""
    print(f"{'operation':18}{'predicted':>11}{'taken':>11}{'':>8}   command", flush=True)
    for name in only or OPERATIONS:
        verb, given = OPERATIONS[name]
        if adapter is None and any("@adapter" in value for value in given.values()):
            continue
        found = {key: value.replace("@adapter", str(adapter)) for key, value in given.items()}
        print(line(name, verb, model, found), flush=True)


def line(name: str, verb: str, model: Path, given: dict[str, str]) -> str:
    """Predicted and taken bytes in MB, how far off the prediction is, and the command."""
    words = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", *parts(key, value))]
    with tempfile.TemporaryDirectory(dir=".", prefix=".plan-") as place:
        out = Path(place) / "out"
        command = [sys.executable, "-m", "bildung", *verb.split(), str(model), str(out), *words]
        if verb == "look compare":  # A B OUT
            against = given["against"]
            words = [word for word in words if word not in ("--against", against)]
            command = [sys.executable, "-m", "bildung", *verb.split(), str(model), against, str(out), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{name:18} failed: {done.stderr.strip()[-300:]}"
        taken = json.loads((out / "record.json").read_text(encoding="utf-8"))["peak_bytes"]
    predicted = planned(verb, model, given)
    shown = " ".join(word if len(word) < 40 else f"{word[:37]}..." for word in words)
    off = predicted["peak"] / taken - 1
    return f"{name:18}{predicted['peak'] / 1e6:11,.0f}{taken / 1e6:11,.0f}{off:+8.1%}   {verb} {shown}"


def parts(key: str, value: str) -> list[str]:
    """A value as words of a command line: lists stand apart, and what is only switched on has none."""
    if not value:
        return []
    return value.split() if key in ("sites", "heads", "at", "layers", "adapters", "probes") else [value]


def planned(verb: str, model: Path, given: dict[str, str]) -> dict[str, Any]:
    """The plan's peak and parts, found in a process of its own."""
    lists = {"sites", "heads", "at", "layers", "adapters", "probes"}
    values = {key: parts(key, value) if key in lists else value or True for key, value in given.items()}
    code = (
        "import json, sys; from pathlib import Path; from bildung.app.planning.passing import looked\n"
        f"made = looked({verb!r}, Path({str(model)!r}), {values!r})\n"
        "best = max(made, key=lambda one: one.peak_bytes)\n"
        "print(json.dumps({'peak': best.peak_bytes, 'parts': best.parts}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

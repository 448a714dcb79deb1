"""What `bildung plan` predicts of operations that do not train, and what they take: the table of docs/log.md.

    python -m benchmarks.plan MODEL_DIRECTORY --looks [--only patch probe] [--adapter LORA]

Each operation runs on the command line, in a process of its own; its plan in another. What they take is the record's
peak; of a command that leaves no record, the most that its process held.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

PROMPT = "When Mary and John went to the store, John gave a drink to"
LONG = " ".join(["The ship sailed on through the night, and nobody on board knew where the captain meant to go."] * 12)
POSITIVE = ("What a lovely day it is.", "I liked every minute of it.", "They were kind to all of us.")
NEGATIVE = ("What a dreadful day it is.", "I hated every minute of it.", "They were cruel to all of us.")
LISTS = "sites heads at layers target_layers adapters probes shots relations source models texts".split()
BEFORE_OUT = {"look compare": "against", "embed": "texts", "generate": "prompt", "relink": "base"}  # without a name


@dataclasses.dataclass(frozen=True)
class Tried:
    """An operation with its settings. source: what it starts from. planned: what its plan is given, where its settings
    say it in other words. said: what is typed. records: whether it leaves a record."""

    verb: str
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: str = "@model"
    planned: Mapping[str, Any] | None = None
    said: str = ""
    records: bool = True


OPERATIONS = {
    "attention": Tried("look attention", {"prompt": LONG, "max_tokens": "512"}),
    "attention, two": Tried("look attention", {"prompt": PROMPT, "against": "@adapter"}),
    "logit_lens": Tried("look logit_lens", {"prompt": PROMPT}),
    "saliency": Tried("look saliency", {"prompt": PROMPT}),
    "attribution": Tried("look attribution", {"prompt": PROMPT}),
    "trace": Tried(
        "look trace",
        {"prompt": "The capital of France is", "subject": "France", "sites": "resid_post", "samples": "4"},
    ),
    "patch": Tried("look patch", {"count": "8", "attribution": ""}),
    "path_patch": Tried("look path_patch", {"count": "2"}),
    "circuit": Tried("look circuit", {"count": "8", "method": "eap", "edges": "100", "knockouts": "1"}),
    "probe": Tried("look probe", {"data": "nursery:brown", "limit": "100", "seeds": "1", "probes": "linear"}),
    "cache": Tried("look cache", {"data": "nursery:imdb", "limit": "60", "sites": "layers.*.resid_post"}),
    "tuned_lens": Tried("look tuned_lens", {"data": "nursery:brown", "steps": "3", "held_out": "2"}),
    "heads": Tried("look heads"),
    "circuits": Tried("look circuits"),
    "induction": Tried("look induction", {"rows": "4"}),
    "by_position": Tried("look by_position", {"data": "nursery:sotu", "rows": "16", "trained": "128"}),
    "gradient_distance": Tried("look gradient_distance", {"rows": "4", "length": "64"}),
    "stream_map": Tried("look stream_map", {"data": "nursery:brown", "pieces": "40", "layers": "5 10"}),
    "steering": Tried(
        "look steering", {"site": "layers.12.resid_post", "positive": "@positive", "negative": "@negative"}
    ),
    "compare": Tried("look compare", {"prompt": PROMPT, "against": "@adapter", "sites": "resid_post", "columns": "8"}),
    "patchscope": Tried("look patchscope", {"prompt": PROMPT, "step": "6", "new_tokens": "4"}),
    "in_context": Tried("look in_context", {"shots": "0 4", "rounds": "1", "questions": "16"}),
    "attributes": Tried(
        "look attributes", {"relations": "capital", "facts": "4", "layers": "10", "target_layers": "0 4"}
    ),
    "multi_hop": Tried("look multi_hop", {"facts": "4", "layers": "10", "target_layers": "0 4"}),
    "index": Tried("look index", {"prompt": PROMPT}),
    "alignment": Tried("look alignment", {"source": "@words"}, "@speaker"),
    "image_attention": Tried("look image_attention", {"image": "@image"}, "@seer"),
    "table": Tried("look table", {"models": "@speaker"}, "@speaker"),
    "embed": Tried("embed", {"texts": "@sentences"}, "@encoder", records=False),
    "tune combine": Tried("tune combine", {"adapters": "@adapter @adapter"}),
    "tune cut": Tried("tune cut", {"rank": "2"}, "@adapter"),
    "tune stretch": Tried("tune stretch", {"positions": "1024"}, "@encoder"),
    "relink": Tried("relink", {"base": "@model", "force": ""}, "@copy", records=False),
    "adopt": Tried("adopt"),
    "adopt, bfloat16": Tried("adopt", {"dtype": "bfloat16"}),
    "merge": Tried("merge", {}, "@adapter"),
    "quantize, int8": Tried("quantize", {"method": "int8"}),
    "quantize, nf4": Tried("quantize", {"method": "nf4"}),
    "evaluate": Tried("evaluate", {"limit": "8"}),
    "generate": Tried("generate", {"prompt": LONG}, planned={"prompt": 241, "new_tokens": 64}, records=False),
    "chat": Tried("chat", {}, planned={"prompt": 280, "new_tokens": 256}, said=LONG, records=False),
    "export": Tried("export", {}, "@run"),
}


class Places:
    """What operations start from, and what they read: made when the first of them asks for it."""

    def __init__(self, model: Path, adapter: Path | None, place: Path) -> None:
        self.model, self.adapter, self.place = model, adapter, place

    def of(self, word: str) -> Any:
        """What a word beginning with @ stands for: a place, or texts."""
        found = getattr(self, word[1:]) if word.startswith("@") else word
        return found if isinstance(found, list) else str(found)

    @property
    def encoder(self) -> Path:
        return Path(os.environ.get("BILDUNG_NURSERY", "nursery")) / "minilm"

    @property
    def words(self) -> list[str]:
        return ["t h o u g h t f u l", "m i s s i s s i p p i"]

    @property
    def sentences(self) -> list[str]:
        return [*POSITIVE, *NEGATIVE, LONG]

    @cached_property
    def positive(self) -> Path:
        return self._texts("positive", POSITIVE)

    @cached_property
    def negative(self) -> Path:
        return self._texts("negative", NEGATIVE)

    @cached_property
    def speaker(self) -> Path:
        """A small encoder-decoder with attention, of recipes/rnn_g2p.yaml."""
        return self._of_recipe("rnn_g2p", "bahdanau")

    @cached_property
    def seer(self) -> Path:
        """A small ViT, of recipes/vit_mnist.yaml."""
        return self._of_recipe("vit_mnist", "vit")

    @cached_property
    def image(self) -> Path:
        from PIL import Image

        Image.new("L", (28, 28), 128).save(made := self.place / "image.png")
        return made

    @cached_property
    def copy(self) -> Path:
        """A copy of the adapter, which is changed."""
        assert self.adapter is not None
        return Path(shutil.copytree(self.adapter, self.place / "adapter"))

    @cached_property
    def run(self) -> Path:
        """A LoRA's training that is killed at its first checkpoint."""
        out = self.place / "run"
        data = "mini:chat --steps 50 --batch-size 1 --max-length 64 --held-out 2 --checkpoint-every 2".split()
        words = ["tune", "lora", self.model, out, "--data", *data]
        process = subprocess.Popen([sys.executable, "-m", "bildung", *words], stderr=subprocess.DEVNULL)
        while not list(self.place.glob("run.partial/.checkpoint-0*")) and process.poll() is None:
            time.sleep(0.2)
        process.kill()
        process.wait()
        return out

    def _texts(self, name: str, texts: tuple[str, ...]) -> Path:
        file = self.place / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return file

    def _of_recipe(self, title: str, step: str) -> Path:
        code = f"from benchmarks.plan import make; make({title!r}, {step!r}, {str(self.place / title)!r}, 2)"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self.place / title / step


def table(model: Path, adapter: Path | None, only: list[str] | None) -> None:
    """Run them one after the other and print a line each."""
    print(f"{'operation':18}{'predicted':>11}{'taken':>11}{'':>8}   command", flush=True)
    with tempfile.TemporaryDirectory(dir=".", prefix=".plan-") as place:
        places = Places(model, adapter, Path(place))
        for name in only or OPERATIONS:
            tried = OPERATIONS[name]
            if adapter is None and {"@adapter", "@copy"} & {tried.source, *" ".join(tried.given.values()).split()}:
                continue
            print(line(name, tried, places), flush=True)


def line(name: str, tried: Tried, places: Places) -> str:
    """Predicted and taken bytes in MB, how far off the prediction is, and the command."""
    source, out = Path(places.of(tried.source)), places.place / "out"
    values: dict[str, Any] = {key: value_of(key, value, places) for key, value in tried.given.items()}
    unnamed = values.get(BEFORE_OUT.get(tried.verb, ""), [])
    flags = [(key, one) for key, one in values.items() if key != BEFORE_OUT.get(tried.verb)]
    words = [word for key, one in flags for word in (f"--{key.replace('_', '-')}", *as_words(one))]
    first = [str(source), *as_words(unnamed), *([str(out)] if tried.records else [])]
    shutil.rmtree(out, ignore_errors=True)
    with (places.place / "said").open("w+", encoding="utf-8") as said:
        said.write(f"{tried.said}\n")
        said.seek(0)
        command = [sys.executable, "-m", "bildung", *tried.verb.split(), *first, *words]
        with (places.place / "errors").open("w+", encoding="utf-8") as errors:
            process = subprocess.Popen(command, stdin=said, stdout=subprocess.DEVNULL, stderr=errors)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            if process.returncode:
                return f"{name:18} failed: {errors.read().strip()[-300:]}"
    taken = used.ru_maxrss * 1024
    if tried.records:
        taken = json.loads((out / "record.json").read_text(encoding="utf-8"))["peak_bytes"]
    predicted = planned(tried, source, values)
    shown = " ".join(word if len(word) < 40 else f"{word[:37]}..." for word in words)
    off = predicted["peak"] / taken - 1
    return f"{name:18}{predicted['peak'] / 1e6:11,.0f}{taken / 1e6:11,.0f}{off:+8.1%}   {tried.verb} {shown}"


def value_of(key: str, value: str, places: Places) -> Any:
    """A value as the plan is given it: lists are lists, and what is only switched on is True."""
    found = [places.of(word) for word in value.split()] if key in LISTS or value.startswith("@") else [value]
    found = [word for one in found for word in (one if isinstance(one, list) else [one])]
    return found if key in LISTS else found[0] or True


def as_words(value: Any) -> list[str]:
    """A value as words of a command line."""
    return [] if value is True else [str(one) for one in value] if isinstance(value, list) else [str(value)]


def planned(tried: Tried, source: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's peak and parts, found in a process of its own."""
    code = ["import json, sys", "from pathlib import Path", f"source = Path({str(source)!r})"]
    if tried.planned is not None:
        code += ["from bildung.app.planning.passes import process_bytes", "from bildung.app.planning.using import use"]
        code += [f"own = process_bytes({tried.verb!r}, source)"]
        code += [f"best = use({tried.verb!r}, source, {dict(tried.planned)!r}, own)"]
    else:
        code += ["from bildung.app.planning.passing import looked"]
        code += [f"best = max(looked({tried.verb!r}, source, {values!r}), key=lambda one: one.peak_bytes)"]
    code += ["print(json.dumps({'peak': best.peak_bytes, 'parts': best.parts}))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tried.verb}: {done.stderr[-600:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

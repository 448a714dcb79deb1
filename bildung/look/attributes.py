"""Attribute extraction: Patchscopes without training data beside trained probes, on the same facts, layer by layer.

    bildung look attributes MODEL OUT                                   capitals, currencies, symbols of elements
    bildung look attributes MODEL OUT --relations capital --facts 60 --step 1

OUT gets attributes.html (one file, works offline), attributes.png and attributes.json with every text. What is measured
is in attribute_extraction.py, the facts are in facts.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.progress import progress
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.look.lenses.lens import check_writes
from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.look.pages.page import command_of, data_url, look_page
from bildung.look.patchscope import every
from bildung.look.patchscopes.attribute_extraction import Extraction, extract
from bildung.look.patchscopes.facts import RELATIONS, facts, relation_of
from bildung.look.patchscopes.patchscopes import check_layer
from bildung.look.prompt import half
from bildung.model.store import LanguageModel, load

LINES = {
    "patchscope, any layer": "any_SN",
    "patchscope, one layer": "one_SN",
    "patchscope, others' objects": "others_SN",
    "probe, names it knows": "seen_SN",
    "probe, new names": "unseen_SN",
}
EXAMPLES = 12


@settings_class
class Settings:
    """Attribute extraction."""

    relations: tuple[str, ...] = tuple(RELATIONS)  # of capital, currency, symbol
    facts: int = 24  # of each relation are tested: so many that the model knows when asked
    layers: tuple[int, ...] = ()  # of the source; default: every step-th and the last
    target_layers: tuple[int, ...] = ()  # default: the same
    step: int = 4  # of all layers every so many-th
    new_tokens: int = 6  # that each run writes
    dtype: Literal["float32", "bfloat16"] | None = None  # type to load the model in; default: as stored
    seed: int = 0  # which facts; the probes' start


def attributes(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page, the picture and the numbers. Raises SettingsError, NoSuchSite, DataError."""
    if settings.facts < 2 or settings.new_tokens < 1 or settings.step < 1 or not settings.relations:
        raise SettingsError("facts is at least 2, new_tokens and step at least 1, and relations names one.")
    data = {relation_of(name).data for name in settings.relations}

    def work(job: Job) -> None:
        lm = load(source, settings.dtype)
        found = extract_relations(lm, settings, job.notes)
        numbers = as_json(found, Path(source).name, command_of(job))
        (job.out / "attributes.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", "utf-8")
        draw(numbers, job.out / "attributes.png")
        (job.out / "attributes.html").write_text(page(numbers, job.out / "attributes.png"), encoding="utf-8")
        job.measured = summary(numbers)
        print(as_text(numbers))

    hashes = {name: value for one in sorted(data) for name, value in fingerprint(one).items()}
    return perform("look attributes", source, out, settings, work, data=hashes, force=force)


def extract_relations(lm: LanguageModel, given: Settings, notes: list[str]) -> dict[str, Extraction]:
    """{relation: what was found}. Notes what has no object."""
    check_writes(lm, answers=True)
    reader = half(lm, "encoder")  # of an encoder-decoder the half that reads questions
    layers, theirs = (list(some) or every(reader, given.step) for some in (given.layers, given.target_layers))
    for layer in [*layers, *theirs]:
        check_layer(reader, layer, "model")
    found = {}
    lm.model.eval()
    with progress("look attributes", len(given.relations) * given.facts * len(layers) * len(theirs)) as bar:
        for name in given.relations:
            every_fact, without = facts(relation_of(name))
            if without:
                notes.append(f"{name}: {without} rows of {RELATIONS[name].data} have no object")
            found[name] = extract(
                lm, relation_of(name), every_fact, layers, theirs, count=given.facts, new_tokens=given.new_tokens,
                seed=given.seed, advance=bar.advance,
            )  # fmt: skip
            if len(found[name].facts) < given.facts:
                notes.append(f"{name}: the model knows {len(found[name].facts)} of {found[name].asked} facts")
    return found


def as_json(found: dict[str, Extraction], model: str, command: str) -> dict[str, Any]:
    """Everything the page and the picture show: {relation: {line: [per layer: [mean, standard error]]}}."""
    relations = {}
    for name, one in found.items():
        per_fact = len(one.layers) * len(one.target_layers)
        grid = one.hits_SNT.double().mean(0)
        relations[name] = {
            "prompt": one.prompt,
            "facts": [[fact.subject, fact.object] for fact in one.facts],
            "asked": one.asked,
            "layers": one.layers,
            "target_layers": one.target_layers,
            "lines": {line: _pairs(getattr(one, field)) for line, field in LINES.items()},
            "majority": round(one.majority, 4),
            "grid": [[round(value, 4) for value in row] for row in grid.tolist()],
            "texts": [one.texts[s * per_fact : (s + 1) * per_fact] for s in range(len(one.facts))],
        }
    return {"model": model, "relations": relations, "command": command}


def _pairs(right_SN: Tensor) -> list[list[float]]:
    errors = right_SN.std(0, correction=1) / math.sqrt(len(right_SN))
    return [[round(a, 4), round(b, 4)] for a, b in zip(right_SN.mean(0).tolist(), errors.tolist(), strict=True)]


def summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that go into the record: the best layer of each line."""
    measured: dict[str, Any] = {}
    for name, one in numbers["relations"].items():
        measured |= {f"{name}: facts": len(one["facts"]), f"{name}: asked": one["asked"]}
        for line, pairs in one["lines"].items():
            best = max(range(len(pairs)), key=lambda n: pairs[n][0])
            measured[f"{name}: {line}"] = pairs[best][0]
            measured[f"{name}: {line}, at layer"] = one["layers"][best]
    return measured


def as_text(numbers: dict[str, Any]) -> str:
    """A table per relation, as Markdown."""
    parts = []
    for name, one in numbers["relations"].items():
        heads, body = table(one)
        lines = [heads, ["---"] * len(heads), *body]
        parts.append(f"{name}: {one['prompt']}\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def table(one: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, a row per source layer)."""
    body = [
        [str(layer), *(f"{pairs[n][0]:.2f} ± {pairs[n][1]:.2f}" for pairs in one["lines"].values())]
        for n, layer in enumerate(one["layers"])
    ]
    return ["layer", *one["lines"]], body


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Accuracy by source layer, a panel per relation."""
    panels = [
        Panel(
            f"{name}: {one['prompt']} ({len(one['facts'])} facts)",
            "source layer",
            {line: (one["layers"], [a for a, _ in pairs]) for line, pairs in one["lines"].items()},
            y_limits=(-0.02, 1.02),
            y_label="accuracy",
            errors={line: [b for _, b in pairs] for line, pairs in one["lines"].items()},
        )
        for name, one in numbers["relations"].items()
    ]
    draw_lines(panels, path)


def page(numbers: dict[str, Any], picture: Path) -> str:
    """attributes.html: the picture, its numbers, the grid of layers and some texts."""
    shown = []
    for name, one in numbers["relations"].items():
        heads, body = table(one)
        best = max(range(len(one["layers"])), key=lambda n: one["lines"]["patchscope, one layer"][n][0])
        into = max(range(len(one["target_layers"])), key=lambda t: one["grid"][best][t])
        place = best * len(one["target_layers"]) + into
        examples = [[*fact, texts[place]] for fact, texts in zip(one["facts"], one["texts"], strict=True)][:EXAMPLES]
        grid = {
            "title": "right, by layer",
            "note": "source layer by target layer",
            "corner": "layer",
            "columns": list(map(str, one["target_layers"])),
            "rows": one["layers"],
            "cells": [
                [{"text": f"{v:.2f}", "v": v, "style": "strong" if v > 0.66 else "", "title": f"{v:.3f}"} for v in row]
                for row in one["grid"]
            ],
        }
        where = f"layer {one['layers'][best]} into {one['target_layers'][into]}"
        facts_line = {
            "facts that the model knows": len(one["facts"]),
            "asked": one["asked"],
            "majority": one["majority"],
        }
        shown.append({"name": name, "prompt": one["prompt"], "heads": heads, "rows": body, "grid": grid, "where": where}
                     | {"examples": examples, "facts": facts_line.items()})  # fmt: skip
    return look_page(
        "attributes.html",
        model=numbers["model"],
        command=numbers["command"],
        picture=data_url(picture),
        relations=shown,
    )

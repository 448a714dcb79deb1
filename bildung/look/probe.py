"""Probe every layer for a property, beside a control task that says how much the probes merely memorise.

    bildung look probe SOURCE OUT --data nursery:brown --limit 400           part-of-speech tags of words
    bildung look probe SOURCE OUT --data nursery:imdb --level text           the class of a text
    bildung look probe SOURCE OUT --data ratings.jsonl --level text --label rating      a number: regression, R²

Linear and MLP probes at each site, the same on the control task (Hewitt & Liang 2019), selectivity, their standard
errors over seeds; with --mdl also the labels' description length (Voita & Titov 2020). All sites are read in one pass.
OUT gets probe.html, probe.png and probe.json. The computation is in activations.py, probes.py and selectivity.py.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.progress import progress
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.rows import Row, Unusable
from bildung.data.sources import fingerprint, rows
from bildung.data.tagged import Label, TagSet, read_tagged, sample
from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.look.pages.page import command_of, data_url, look_page
from bildung.look.probing.activations import Piece, Units, collect, text_units, vector_sites, word_units
from bildung.look.probing.probes import Kind, Options
from bildung.look.probing.selectivity import Sweep, mean_and_error, sweep
from bildung.model.store import LanguageModel, load

VECTORS = "vectors"  # folder of activations, while there are more than the memory shall hold


@settings_class
class Settings:
    """Probes, control tasks, selectivity."""

    data: str  # rows of words and tags, or of texts and labels
    level: Literal["word", "text"] = "word"  # what has a label
    words: str = "words"  # word level: column of the words
    tags: str = "tags"  # word level: column of their labels
    tag_set: TagSet = "auto"  # word level: coarse (Brown's tags as twelve classes), raw, number; auto: as they look
    text: str = "text"  # text level: column of the text
    label: str = "label"  # text level: column of its class or number
    sites: tuple[str, ...] = ()  # patterns of sites; default: the residual stream below and after each layer
    piece: Piece | None = None  # which tokens are a word's (default: last), or a text's (default: mean)
    probes: tuple[Kind, ...] = ("linear", "mlp")  # kinds of probe
    mdl: bool = False  # description length by the online code too: eleven more probes for each
    limit: int | None = 400  # so many sentences or texts, drawn from all of the source
    max_length: int = 128  # tokens of a sentence or text; of longer ones the end is cut off
    seeds: int = 3  # how often all is repeated, each time with another split, control task and start
    seed: int = 0  # the first of them
    dtype: Literal["float32", "bfloat16"] | None = None  # type to load the model in; default: as stored
    memory: float = 4.0  # GB of activations held in memory; more are kept in files in OUT until the probes are trained
    options: Options = field(default_factory=Options)  # how probes are made and trained


@dataclass
class Probed:
    """What `probe_model` found: the sweep, what had a label, and what was left out."""

    sweep: Sweep
    units: Units
    notes: list[str]


def probe(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page, the picture and the numbers. Raises DataError, NoSuchSite, SettingsError."""
    check(settings)

    def work(job: Job) -> None:
        lm = load(source, settings.dtype)
        found = probe_model(lm, settings, job.out / VECTORS)
        shutil.rmtree(job.out / VECTORS, ignore_errors=True)
        numbers = as_json(found, settings, Path(source).name) | {"command": command_of(job)}
        (job.out / "probe.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(numbers, job.out / "probe.png")
        (job.out / "probe.html").write_text(page(numbers, job.out / "probe.png"), encoding="utf-8")
        job.tokens_seen = sum(len(read.tokens) for read in found.units.reads)
        job.measured, job.notes = summary(numbers), found.notes
        print(as_text(numbers))

    return perform("look probe", source, out, settings, work, data=fingerprint(settings.data), force=force)


def check(given: Settings) -> None:
    """Raises SettingsError for a number out of range."""
    given.options.check()
    least = {"seeds": 1, "limit": 1, "max_length": 4, "memory": 0}
    if wrong := [name for name in least if (value := getattr(given, name)) is not None and value < least[name]]:
        raise SettingsError(f"{wrong[0]} = {getattr(given, wrong[0])}; it must be at least {least[wrong[0]]}.")
    if not given.probes:
        raise SettingsError("probes names no kind of probe; there are linear and mlp.")


def probe_model(lm: LanguageModel, given: Settings, folder: Path | None = None) -> Probed:
    """Read the data through the model once, then train and test every probe. Runs where the model is. folder: where
    activations go that are too many for the memory; an interrupted reading goes on there."""
    check(given)
    sites = vector_sites(lm, given.sites)
    longest = min(given.max_length, getattr(lm.config, "max_position_embeddings", None) or given.max_length)
    if given.level == "word":
        sentences, notes = read_tagged(
            given.data, words=given.words, tags=given.tags, tag_set=given.tag_set, limit=given.limit
        )
        units = word_units(lm, sentences, given.piece or "last", longest)
    else:
        texts, notes = read_texts(given)
        units = text_units(lm, texts, given.piece or "mean", longest)
    with progress("reading", len(units.reads)) as bar:
        vectors = collect(lm, units.reads, sites, folder=folder, most_bytes=given.memory * 1e9, advance=bar.advance)
    with progress("look probe", given.seeds * len(sites) * len(given.probes)) as bar:
        found = sweep(
            vectors, units.labels, units.types, units.sentence, kinds=given.probes, options=given.options,
            seeds=given.seeds, seed=given.seed, bits=given.mdl, device=lm.model.device,
            advance=lambda site: bar.advance(1),
        )  # fmt: skip
    return Probed(found, units, notes + units.report())


def read_texts(given: Settings) -> tuple[list[tuple[str, Label]], list[str]]:
    """(texts with their labels, notes). A column of fractions is of numbers, one of whole numbers of classes."""

    def usable(row: Row) -> tuple[str, Any]:
        text, label = row.get(given.text), row.get(given.label)
        if not isinstance(text, str) or not text.strip():
            raise Unusable(f"no text in {given.text!r}")
        if not isinstance(label, str | int | float) or label == "":
            raise Unusable(f"no label in {given.label!r}")
        return text, label

    found = rows(given.data).then(usable)
    read = list(found)
    if given.limit is not None and given.limit < len(read):
        read = sample(read, given.limit)
    numbers = given.tag_set == "number" or any(isinstance(label, float) for _, label in read)
    notes = [f"{given.data}: {report}"] if (report := found.report()) else []
    return [(text, float(label) if numbers else str(label)) for text, label in read], notes


def as_json(found: Probed, given: Settings, model: str) -> dict[str, Any]:
    """Everything the page and the picture show: {kind: {measure: [per site: [mean, standard error]]}}."""
    sweep, units = found.sweep, found.units
    measures = {"score": sweep.score_PSR, "control": sweep.control_PSR, "selectivity": sweep.selectivity_PSR}
    if sweep.bits_PSR is not None and sweep.control_bits_PSR is not None:
        measures |= {"bits": sweep.bits_PSR, "control_bits": sweep.control_bits_PSR}
    labels = Counter(map(str, units.labels)) if sweep.classes else Counter()
    return {
        "model": model,
        "data": given.data,
        "level": given.level,
        "piece": given.piece or ("last" if given.level == "word" else "mean"),
        "metric": "accuracy" if sweep.classes else "R²",
        "units": len(units.labels),
        "parts": list(sweep.units),
        "types": len(set(units.types)),
        "texts": len(units.reads),
        "labels": dict(labels.most_common()),
        "seeds": given.seeds,
        "sites": sweep.sites,
        "majority": round(sweep.majority, 4),
        "by_type": round(sweep.by_type, 4),
        "uniform_bits": round(sweep.uniform_bits, 4) if sweep.classes else None,
        "probes": {
            kind: {name: _pairs(values[p]) for name, values in measures.items()} for p, kind in enumerate(sweep.kinds)
        },
        "left_out": dict(units.left_out),
        "examples": units.examples,
        "notes": found.notes,
    }


def _pairs(values_SR: Tensor) -> list[list[float | None]]:
    mean, error = mean_and_error(values_SR)
    return [
        [round(a, 4), round(b, 4) if math.isfinite(b) else None]
        for a, b in zip(mean.tolist(), error.tolist(), strict=True)
    ]


def summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that go into the record: the best site of each kind of probe."""
    measured: dict[str, Any] = {"units": numbers["units"], "left out": sum(numbers["left_out"].values())}
    measured |= {"majority": numbers["majority"], "by word type": numbers["by_type"]}
    for kind, values in numbers["probes"].items():
        for name in ("score", "selectivity"):
            best = max(range(len(numbers["sites"])), key=lambda s: values[name][s][0])
            measured[f"{kind}: best {name}"] = values[name][best][0]
            measured[f"{kind}: best {name} at"] = numbers["sites"][best]
    return measured


HEADS = {
    "score": "",
    "control": "control",
    "selectivity": "selectivity",
    "bits": "bits",
    "control_bits": "control bits",
}


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the table: a row per site, means with their standard errors."""
    heads, columns = ["site"], []
    for kind, values in numbers["probes"].items():
        for name, pairs in values.items():
            heads.append(f"{kind} {HEADS[name] or numbers['metric']}")
            columns.append([f"{a:.3f}" + (f" ± {b:.3f}" if b is not None else "") for a, b in pairs])
    return heads, [[site, *(column[s] for column in columns)] for s, site in enumerate(numbers["sites"])]


def as_text(numbers: dict[str, Any]) -> str:
    """The table as Markdown."""
    heads, body = table(numbers)
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *body)]
    return "\n".join(lines)


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Score and control score by site, and beside them the selectivity, as a PNG."""
    places, axis = along(numbers["sites"])
    metric, probes = numbers["metric"], numbers["probes"]

    def line(kind: str, name: str) -> tuple[list[int], list[float]]:
        return places, [a for a, _ in probes[kind][name]]

    def errors(kind: str, name: str) -> list[float]:
        return [b or 0.0 for _, b in probes[kind][name]]

    # Probes first, then their controls: a probe has the same colour in every panel.
    named = {f"{kind}{end}": (kind, name) for name, end in (("score", ""), ("control", " control")) for kind in probes}
    lines: dict[str, Any] = {shown: line(*which) for shown, which in named.items()}
    lines["word type" if numbers["level"] == "word" else "last word"] = (places, [numbers["by_type"]] * len(places))
    panels = [
        Panel(
            f"{metric} of probes in {numbers['model']}", axis, lines, y_label=metric,
            errors={shown: errors(*which) for shown, which in named.items()},
        ),
        Panel(
            f"selectivity: {metric} minus {metric} on the control task", axis,
            {kind: line(kind, "selectivity") for kind in probes}, y_label="selectivity",
            errors={kind: errors(kind, "selectivity") for kind in probes},
        ),
    ]  # fmt: skip
    if all("bits" in values for values in probes.values()):
        named = {
            f"{kind}{end}": (kind, name)
            for kind in probes
            for name, end in (("bits", ""), ("control_bits", " control"))
        }
        coded = {shown: line(*which) for shown, which in named.items()}
        title = f"description length; a uniform code: {numbers['uniform_bits']:.2f}"
        panels.append(Panel(title, axis, coded, y_label="bits per label"))
    draw_lines(panels, path)


def along(sites: Sequence[str]) -> tuple[list[int], str]:
    """(where each site stands, what the axis is): the number of layers below it, if all are of the residual stream."""
    found = [re.fullmatch(r"(.*)layers\.(\d+)\.resid_(pre|post)", site) for site in sites]
    passed = [int(one[2]) + (one[3] == "post") for one in found if one]
    if len({one[1] for one in found if one}) == 1 and len(set(passed)) == len(sites):
        return passed, "layers passed (0: the embedding)"
    return list(range(len(sites))), "site, in the order of the table"


def page(numbers: dict[str, Any], picture: Path) -> str:
    """probe.html: the picture and the same numbers as a table."""
    heads, body = table(numbers)
    values = {name: value for name, value in numbers.items() if name != "data"} | {"data_name": numbers["data"]}
    return look_page(
        "probe.html", heads=heads, rows=body, picture=data_url(picture), facts=summary(numbers).items(), **values
    )

"""Several trained models beside each other: one table of what their records say, and their learning curves.

    bildung look table lives/lm/rnn OUT --models lives/lm/lstm lives/lm/gru lives/lm/transformer

The held-out loss is drawn over the tokens that were read and over the seconds that passed, in bits per byte where the
record has them. OUT gets table.md, table.json and curves.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bildung.core.errors import DataError, RecordError
from bildung.core.operation import Job, perform
from bildung.core.record import Record, read_record
from bildung.core.settings import settings as settings_class
from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.model.store import load
from bildung.train.history import METRICS

# What a column is called, the figure of the record it shows, and how.
COLUMNS = {
    "trainable_parameters": ("parameters", "{:,.0f}"),
    "tokens_seen": ("tokens read", "{:,.0f}"),
    "held_out_bits_per_byte": ("bits per byte", "{:.3f}"),
    "held_out_nats_per_token": ("nats per token", "{:.3f}"),
    "per": ("phoneme error", "{:.3f}"),
    "wer": ("word error", "{:.3f}"),
    "exact_match": ("exact", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "peak_megabytes": ("peak MB", "{:,.0f}"),
    "memory_of_1000_tokens": ("memory of 1000 tokens, kB", "{:,.1f}"),
}
BASELINES = ("unigram_bits_per_byte", "kneser_ney_bits_per_byte", "per_most_frequent", "per_copy_source")


@settings_class
class Settings:
    """A table of models."""

    models: tuple[Path, ...] = ()  # more models, with SOURCE the rows of the table
    figures: tuple[str, ...] = ()  # more figures of the records ("measured") as columns


def table(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the table and the picture. Raises RecordError for a directory without a record."""
    source = Path(source)
    places = {Path(place).resolve().name: Path(place) for place in (source, *settings.models)}

    def work(job: Job) -> None:
        rows = {name: figures(place, settings.figures) for name, place in places.items()}
        (job.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        text = as_markdown(rows, settings.figures)
        (job.out / "table.md").write_text(text, encoding="utf-8")
        print(text)
        if (panels := curves(places)) is not None:
            draw_lines(panels, job.out / "curves.png")
        job.measured = {f"{name}: {key}": value for name, row in rows.items() for key, value in row.items()}

    companions = {f"row {name}": place for name, place in places.items() if place != source}
    return perform("look table", source, out, settings, work, companions=companions, force=force)


def figures(place: Path, more: tuple[str, ...]) -> dict[str, float]:
    """What the record of one model says, and what its memory of the past takes."""
    record = read_record(place)
    if record is None:
        raise RecordError(f"{place} holds no record; only directories that an operation made can be compared.")
    known = {**record.measured, "tokens_seen": record.tokens_seen, "peak_megabytes": record.peak_bytes / 2**20}
    lm = load(place)
    if hasattr(lm.model, "kv_cache"):
        known["memory_of_1000_tokens"] = lm.model.kv_cache(1, 1000).nbytes / 1000
    wanted = (*COLUMNS, *BASELINES, *more)
    return {name: known[name] for name in wanted if isinstance(known.get(name), int | float)}


def as_markdown(rows: dict[str, dict[str, float]], more: tuple[str, ...]) -> str:
    """The table, with the baselines below it."""
    shown = [name for name in (*COLUMNS, *more) if any(name in row for row in rows.values())]
    titles = ["model", *(COLUMNS.get(name, (name, ""))[0] for name in shown)]
    lines = [titles, ["---", *["---:"] * len(shown)]]
    for model, row in rows.items():
        cells = [COLUMNS.get(name, ("", "{:.3f}"))[1].format(row[name]) if name in row else "" for name in shown]
        lines.append([model, *cells])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    first = next(iter(rows.values()))
    known = [f"{name.replace('_', ' ')} {first[name]:.3f}" for name in BASELINES if name in first]
    return text + "\n" + (f"\nBaselines: {', '.join(known)}.\n" if known else "")


def curves(places: dict[str, Path]) -> list[Panel] | None:
    """Held-out loss over tokens and over seconds; None when no log has it."""
    by_tokens: dict[str, Any] = {}
    by_seconds: dict[str, Any] = {}
    unit = "bits per byte"
    for name, place in places.items():
        tokens, points = 0, []
        for row in _log(place):
            tokens += row.get("tokens", 0)
            if "held_out_loss" in row:
                points.append((tokens, row.get("seconds", 0.0), row["held_out_loss"]))
        if len(points) < 2:
            continue
        record = read_record(place)
        measured = record.measured if record is not None else {}
        if "held_out_bits_per_byte" in measured:
            factor = measured["held_out_bits_per_byte"] / measured["held_out_nats_per_token"]
        else:
            factor, unit = 1.0, "nats per token"
        xs, seconds, ys = zip(*points, strict=True)
        by_tokens[name] = xs, [loss * factor for loss in ys]
        by_seconds[name] = seconds, [loss * factor for loss in ys]
    if not by_tokens:
        return None
    # Where training began is far above all the rest, and the same for all: it is cut off.
    first, lowest = (max(ys[1] for _, ys in by_tokens.values()), min(min(ys) for _, ys in by_tokens.values()))
    limits = (lowest - 0.1 * (first - lowest), first + 0.1 * (first - lowest))
    return [
        Panel(f"held-out {unit}, by tokens read", "tokens", by_tokens, y_limits=limits),
        Panel(f"held-out {unit}, by time", "seconds of training", by_seconds, y_limits=limits),
    ]


def _log(place: Path) -> list[dict[str, Any]]:
    path = place / METRICS
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error

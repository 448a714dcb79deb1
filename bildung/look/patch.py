"""Which activations carry the answer? Patch every site, layer, place and head of a clean run into a corrupted one.

    bildung look patch MODEL OUT --pairs ioi
    bildung look patch MODEL OUT --pairs agreement --metric probability --direction noising
    bildung look patch MODEL OUT --pairs pairs.jsonl --sites resid_pre --heads attn.z attn.v --at end S2 --attribution
    bildung look patch T5 OUT --pairs pairs.jsonl --sites resid_post decoder.cross.out --heads decoder.cross.z

`sites` are patched layer by layer at each place; `heads` head by head, at the places `at` (none: at all positions).
OUT gets patch.html (one file, works offline), patch.png, patch.json and the pairs. The computation and what it means
are in patching.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.asked import asked
from bildung.look.causal.answer_metrics import MetricName
from bildung.look.causal.pair_tasks import Corruption
from bildung.look.causal.patching import Across, Direction, Grid, labelled, patching_grid
from bildung.look.pages.grid_page import write_grids
from bildung.look.pages.page import command_of
from bildung.look.pairs import chosen_pairs, pair_hashes
from bildung.model.store import load


@settings_class
class Settings:
    """Activation patching."""

    pairs: str = "ioi"  # ioi, agreement, or a JSONL file of pairs
    count: int = 16  # how many pairs are made, or read
    corruption: Corruption = "abc"  # of ioi: three other names, or the second one swapped
    seed: int = 0  # of what is made
    sites: tuple[str, ...] = ("resid_pre", "attn.out", "mlp.out")  # patched at each place
    heads: tuple[str, ...] = ("attn.z",)  # patched at each head
    at: tuple[str, ...] = ()  # where: names of places, or positions counted from 0
    metric: MetricName = "logit_difference"
    direction: Direction = "denoising"
    attribution: bool = False  # one backward pass instead of a run per patch: the first order only
    batch_size: int = 16


def patch(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page, the picture and the numbers. Raises SettingsError, DataError."""

    def work(job: Job) -> None:
        lm = load(source, "float32")
        lm.model.eval()
        pairs = chosen_pairs(lm, settings.pairs, settings.count, settings.seed, settings.corruption, job)
        if not settings.sites and not settings.heads:
            raise SettingsError("nothing to patch: give --sites or --heads.")
        wanted: list[tuple[str, Across]] = [(site, "place") for site in settings.sites]
        wanted += [(site, "head") for site in settings.heads]
        model = asked(lm)
        grids = [
            patching_grid(
                model,
                pairs,
                site=site,
                across=across,
                at=settings.at,
                metric=settings.metric,
                direction=settings.direction,
                attribution=settings.attribution,
                batch_size=settings.batch_size,
            )
            for site, across in wanted
        ]
        first = pairs.rows[0]
        example = [lm.tokenizer.decode(list(ids)) for ids in (first.clean, first.corrupted, first.answers[:1])]
        numbers = as_json(grids, Path(source).name, example, settings) | {"command": command_of(job)}
        (job.out / "patch.json").write_text(json.dumps(numbers, ensure_ascii=False) + "\n", encoding="utf-8")
        write_grids(numbers, job.out / "patch.html", job.out / "patch.png")
        job.measured |= {key: numbers[key] for key in ("clean", "corrupted")}
        for grid in grids:
            name, value = next(labelled(grid))
            job.measured[f"strongest {grid.site}"] = f"{name}: {value:.3g}"
        job.tokens_seen = sum(len(pair.clean) + len(pair.corrupted) for pair in pairs.rows)

    data = pair_hashes(settings.pairs)
    return perform("look patch", source, out, settings, work, data=data, force=force)


def as_json(grids: list[Grid], model: str, example: list[str], settings: Settings) -> dict[str, Any]:
    """Everything the page and the picture show; values are [layer][column]."""
    what = "attribution patching" if settings.attribution else f"activation patching, {settings.direction}"
    first_order = "Each cell is what exchanging one activation would do to first order: one gradient, times the change."
    return ({"each": first_order} if settings.attribution else {}) | {
        "title": what,
        "model": model,
        "metric": settings.metric,
        "clean": round(grids[0].clean, 4),
        "corrupted": round(grids[0].corrupted, 4),
        "example": dict(zip(("clean", "corrupted", "answer"), example, strict=True)),
        "low": "as the corrupted prompt",
        "high": "as the clean prompt",
        "grids": [
            {
                "title": grid.site,
                "note": ("recovered" if grid.direction == "denoising" else "left") + ", 0 to 1",
                "columns": grid.columns,
                "rows": [str(layer) for layer in range(len(grid.values))],
                "values": [[round(value, 4) for value in row] for row in grid.recovered.tolist()],
                "neutral": 0.0 if grid.direction == "denoising" else 1.0,
            }
            for grid in grids
        ],
    }

"""Tell a model's life on one page: what was done, what it cost, and what it changed.

    bildung report lives/smollm2 lives/smollm2-report          a whole life: every directory in it with a record
    bildung report lives/smollm2/aligned OUT                   the life beside this model

OUT gets report.html, one file without scripts that works offline, in print, on a phone, in light and in dark. It shows
only what the records say; what they lack is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bildung.app import family_tree
from bildung.app.chapters import METRICS, Chapter, card_tasks, find_directories, main_line, read_life
from bildung.app.report_parts import chapter_values, states, text_of, whole_life
from bildung.core.operation import Job, perform
from bildung.core.progress import duration, size
from bildung.core.record import RECORD, Record, hash_file
from bildung.core.settings import settings as settings_class
from bildung.data import nursery
from bildung.look.pages.page import HTML, render

PAGE = Path(__file__).parent / "page"


@settings_class
class Settings:
    """The report of a life."""

    life: tuple[Path, ...] = ()  # a life's directory or its parts; none: the source, or what lies beside it
    title: str | None = None  # none: the name of the life's directory


def report(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Write the report. Raises RecordError when there is nothing to report on or a record cannot be read."""
    source, out = Path(source), Path(out)
    is_model = (source / RECORD).is_file()
    places = settings.life or ((source.parent if is_model else source),)
    directories = find_directories(places, leave_out=[out])
    title = settings.title or directories[0].resolve().parent.name

    def work(job: Job) -> None:
        chapters = read_life(directories)
        (job.out / "report.html").write_text(page(title, chapters, out), encoding="utf-8")
        job.measured = {"operations": len(chapters), "bytes": (job.out / "report.html").stat().st_size}

    # A life's own directory is no model and may hold `out`; the records in it are what counts.
    return perform(
        "report", source if is_model else None, out, settings, work, data=read_from(directories), force=force
    )


def read_from(directories: list[Path]) -> dict[str, str]:
    """{path: sha256} of the records and logs: when one of them changes, so does the report."""
    files = [directory / name for directory in directories for name in (RECORD, METRICS)]
    return {str(file): hash_file(file) for file in files if file.is_file()}


def page(title: str, chapters: list[Chapter], out: Path) -> str:
    """report.html."""
    values = [chapter_values(chapter, out) for chapter in chapters]
    line = main_line(chapters)
    tree, width = family_tree.draw(chapters)
    return render(
        "report.html",
        folders=(PAGE, HTML),
        title=title,
        totals=totals(chapters),
        longest=max(chapter.record.seconds for chapter in chapters),
        tree=tree,
        tree_width=width,
        row_height=family_tree.ROW,
        chapters=values,
        whole=whole_life(line[0], line[-1]) if len(line) > 1 else None,
        states=states(chapters, line),
        measured=[chapter for chapter in values if card_tasks(chapters[chapter["number"] - 1])],
        provenance=provenance(chapters),
    )


def totals(chapters: list[Chapter]) -> dict[str, str]:
    """The whole life's costs."""
    records = [chapter.record for chapter in chapters]
    accelerator = max(record.accelerator_peak_bytes for record in records)
    return {
        "operations": str(len(chapters)),
        "time": duration(sum(record.seconds for record in records)),
        "memory": size(max(record.peak_bytes for record in records)),
        "accelerator": size(accelerator) if accelerator else "",
        "disk": size(sum(chapter.bytes_on_disk for chapter in chapters)),
        "seen": f"{sum(record.tokens_seen for record in records):,}",
        "trained": f"{sum(record.trained_tokens for record in records):,}",
        "began": min(record.started for record in records)[:16].replace("T", " "),
    }


def provenance(chapters: list[Chapter]) -> dict[str, Any]:
    """On what and with what all of it was made."""
    data: dict[tuple[str, str], list[int]] = {}
    for chapter in chapters:
        for name, digest in chapter.record.data.items():
            data.setdefault((name, digest), []).append(chapter.number)
    return {
        "machines": _grouped(chapters, lambda record: _machine(record.hardware)),
        "versions": _grouped(chapters, lambda record: ", ".join(f"{k} {v}" for k, v in record.versions.items())),
        "data": [
            {"name": name, "sha256": digest, "used": used, "licence": licence(name)}
            for (name, digest), used in data.items()
        ],
        "models": [
            {
                "number": chapter.number,
                "name": chapter.name,
                "started": chapter.record.started[:16].replace("T", " "),
                "seed": "none" if chapter.record.seed is None else chapter.record.seed,
                "source": chapter.record.source["hash"] if chapter.record.source else "",
                "fingerprint": chapter.record.fingerprint,
            }
            for chapter in chapters
        ],
    }


def licence(name: str) -> str:
    """Under which licence a data set stands, as far as it is known."""
    found = re.match(r"nursery:([\w.-]+)", name)
    if found and found.group(1) in nursery.manifest():
        entry: Mapping[str, Any] = nursery.manifest()[found.group(1)]
        return "; ".join(str(entry[key]) for key in ("licence", "origin") if entry.get(key))
    if name.startswith("mini:"):
        return "part of bildung, see bildung/data/mini/LICENSES.md"
    return "not recorded"


def _machine(hardware: Mapping[str, Any]) -> str:
    parts = [f"{name} {size(v) if name.endswith('bytes') else text_of(v)}" for name, v in hardware.items()]
    return ", ".join(parts).replace("memory_bytes", "memory")


def _grouped(chapters: list[Chapter], describe: Any) -> list[dict[str, Any]]:
    """[{"text", "numbers": of the operations it holds for}]."""
    groups: dict[str, list[int]] = {}
    for chapter in chapters:
        groups.setdefault(describe(chapter.record) or "not recorded", []).append(chapter.number)
    return [{"text": text, "numbers": numbers} for text, numbers in groups.items()]

"""Make pairs of prompts for causal analysis, as a JSONL file: indirect objects, subject-verb agreement.

    bildung look pairs MODEL OUT --task ioi --count 64 --corruption swap

MODEL is a model or a directory with a tokenizer. OUT gets pairs.jsonl, in the form that `look patch`, `look circuit`
and `look path_patch` read (prompt_pairs.py); edit it, or write one by hand.
"""

from __future__ import annotations

from pathlib import Path

from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.data.sources import rows as rows_of
from bildung.look.asked import mask_id_of
from bildung.look.causal.pair_tasks import Corruption, Row, Task, make_rows
from bildung.look.causal.prompt_pairs import Pairs, encode_pairs, read_pairs, write_pairs
from bildung.look.prompt import frame_around
from bildung.model.encoder import Encoder
from bildung.model.store import LanguageModel
from bildung.tokens.tokenizer import Tokenizer

FILE = "pairs.jsonl"
TASKS: dict[str, Task] = {"ioi": "ioi", "agreement": "agreement"}  # what stands for a file of pairs


@settings_class
class Settings:
    """Pairs of prompts."""

    task: Task = "ioi"
    count: int = 64
    corruption: Corruption = "abc"  # of ioi: three other names, or the second one swapped for the first
    seed: int = 0


def pairs(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Write the file. Raises DataError where the tokenizer has too few whole words."""

    def work(job: Job) -> None:
        tokenizer = Tokenizer.load(Path(source))
        rows = make_rows(settings.task, tokenizer, settings.count, settings.seed, settings.corruption)
        write_pairs(rows, job.out / FILE)
        lengths = [len(tokenizer.encode(row["clean"])) for row in rows]
        job.measured = {"pairs": len(rows), "shortest": min(lengths), "longest": max(lengths)}

    return perform("look pairs", source, out, settings, work, force=force)


def chosen_pairs(lm: LanguageModel, name: str, count: int, seed: int, corruption: Corruption, job: Job) -> Pairs:
    """Pairs of a task, or of a file; those made are left in OUT, those dropped or not reached by `count` are said."""
    longest = getattr(lm.config, "max_position_embeddings", None) or 512
    if name in TASKS:
        rows = [_for_model(lm, row) for row in make_rows(TASKS[name], lm.tokenizer, count, seed, corruption)]
        write_pairs(rows, job.out / FILE)
        return encode_pairs(rows, lm, name, longest)
    read = read_pairs(name, lm, count, longest)
    notes = []
    if read.dropped:
        notes.append(f"{len(read.dropped)} pairs were left out: " + "; ".join(read.dropped))
    if sum(1 for _ in rows_of(name, limit=count + 1)) > count:
        notes.append(f"{name} has more than the first {count} pairs, which were read; --count reads more")
    job.notes += notes
    print(*notes, sep="\n", end="\n" if notes else "")
    job.measured |= {"pairs": len(read.rows), "pairs left out": len(read.dropped)}
    return read


def _for_model(lm: LanguageModel, row: Row) -> Row:
    """A row made for a decoder's tokenizer, as this model reads it: a masked encoder is asked at the end of the text,
    and what stands before a text moves its places."""
    if isinstance(lm.model, Encoder) and mask_id_of(lm) is not None:
        row = row | {key: f"{row[key]} {lm.tokenizer.named['mask_token']}" for key in ("clean", "corrupted")}
    moved = len(frame_around(lm).before) - len(lm.tokenizer.encode(""))
    return row | {"places": {place: index + moved for place, index in row["places"].items()}}


def pair_hashes(name: str) -> dict[str, str]:
    """What `perform` should know of the data: nothing where it is made from the settings."""
    return {} if name in TASKS else fingerprint(name)

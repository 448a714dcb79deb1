"""Text that can only be guessed from its own past: stretches of a text's words, drawn at random, over and over.

    bildung data repeats mini:moby OUT --words 128 --length 63

    the whale my | of so a sea | of so a sea | of so a sea | of ...      one row: a stretch of distinct words, repeated

The first time round a word can be guessed by how often it occurs; from then on with certainty, by whoever looks where
it stood last and what came next (induction). How long the stretch is differs from row to row, so counting back does not
help. OUT gets train.jsonl (rows with `text`) for `tokenizer train --algorithm word` and `pretrain causal`.
"""

# W words

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.data.text import documents


@settings_class
class Settings:
    """Repeated random words."""

    words: int = 128  # the most frequent words of SOURCE
    length: int = 63  # words of a row
    shortest: int = 8  # words of the shortest stretch
    longest: int = 31  # words of the longest
    rows: int = 10_000
    seed: int = 0


def repeats(source: str | Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Write the rows. Raises SettingsError for stretches that do not fit, DataError for too few different words."""
    given, source = settings, str(source)
    if not 1 <= given.shortest <= given.longest <= min(given.words, given.length) or given.rows < 1:
        raise SettingsError(
            f"stretches of {given.shortest} to {given.longest} words in rows of {given.length} of {given.words} words: "
            f"they must not be longer than a row or the number of words, and there must be a row."
        )

    def work(job: Job) -> None:
        counts = Counter(word for text in documents(source) for word in text.lower().split() if word.isalpha())
        if len(counts) < given.words:
            raise DataError(f"{source} has {len(counts)} different words and {given.words} were asked for.")
        with (job.out / "train.jsonl").open("w", encoding="utf-8") as file:
            for row in drawn(dict(counts.most_common(given.words)), given):
                file.write(json.dumps({"text": " ".join(row)}) + "\n")
        job.measured = {"rows": given.rows, "words": given.words}

    return perform("data repeats", None, out, settings, work, data=fingerprint(source), force=force)


def drawn(counts: dict[str, int], given: Settings) -> Iterator[list[str]]:
    """Rows of words. Each stretch is drawn without replacement, each word in proportion to its frequency: the largest
    of log(frequency) + Gumbel noise are such a draw."""
    words, random = list(counts), np.random.default_rng(given.seed)
    log_W: NDArray[np.float64] = np.log(np.array(list(counts.values()), dtype=np.float64))
    for _ in range(given.rows):
        size = int(random.integers(given.shortest, given.longest + 1))
        chosen = np.argsort(-(log_W + random.gumbel(size=len(words))))[:size]
        random.shuffle(chosen)
        times = -(-given.length // size)
        yield [words[number] for number in np.tile(chosen, times)[: given.length]]

"""Learn a tokenizer from text.

    bildung tokenizer train nursery:imdb words --algorithm unigram --vocab-size 4000 --normalize nfkc
    bildung tokenizer train nursery:kjv both --also nursery:sparv --algorithm bpe       # one vocabulary for both
    bildung tokenizer train nursery:cmudict sounds --columns phonemes --algorithm word

SOURCE is text: a file, a folder, nursery:NAME, mini:NAME or hub:OWNER/NAME. OUT becomes a directory that
transformers.AutoTokenizer opens too, with equal ids, and that `bildung pretrain` makes models for.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.tokenizer.corpus import HELD_OUT_EVERY, Corpus, fingerprints
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import DEFAULT_SIZE, Learning
from bildung.tokenizer.measure import measure


@settings_class
class Settings(Learning):
    """Learning a tokenizer."""

    columns: tuple[str, ...] = ()  # the columns that hold text; default: text, or what is said in conversations
    also: tuple[str, ...] = ()  # further sources, learned from together with SOURCE
    limit: int | None = None  # use only the first so many rows of each source


def train(source: str | Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Learn a tokenizer from the text of `source`; `out` becomes a tokenizer directory.

    Raises DataError for a source that is not there or has no text, SettingsError for settings that do not fit together
    or a vocabulary size below the alphabet.
    """
    sources = [str(source), *settings.also]
    corpus = Corpus(sources, settings.columns, settings.limit)

    def work(job: Job) -> None:
        learned = learn(corpus.training, settings)
        tokenizer = learned.tokenizer
        job.notes += corpus.notes()
        size = len(tokenizer.backend.get_vocab())
        asked = settings.vocab_size or (DEFAULT_SIZE if settings.algorithm not in ("word", "character", "byte") else 0)
        if size < asked:
            job.notes.append(
                f"the text has no more to merge: {size} tokens and not {asked}. More text gives more, or a smaller "
                f"min_frequency"
            )
        if learned.left_out:
            job.notes.append(f"{learned.left_out} rare characters got no token")
        held = list(corpus.held_out)
        if not held:
            job.notes.append(f"measured on the training text: of fewer than {HELD_OUT_EVERY} passages none is held out")
        measured = measure(tokenizer, held or corpus.training)
        job.measured |= {"vocabulary": size, "characters": learned.characters, "characters_left_out": learned.left_out}
        job.measured["held_out" if held else "training_text"] = measured.as_dict()
        tokenizer.save(job.out)  # last: a text that turns out to be empty leaves nothing behind

    record = perform("tokenizer train", None, out, settings, work, data=fingerprints(sources), force=force)
    Console(highlight=False).print(summary(record), markup=False, soft_wrap=True)
    return record


def summary(record: Record) -> str:
    """The outcome in a few lines."""
    measured = record.measured
    of = measured["held_out"] if "held_out" in measured else measured["training_text"]
    first = (
        f"{record.settings['algorithm']}, {measured['vocabulary']:,} tokens. On {of['passages']:,} passages: "
        f"{of['tokens_per_word']:.3f} tokens per word, {of['bytes_per_token']:.3f} bytes per token, "
        f"{of['unknown_rate']:.2%} unknown"
    )
    return "\n".join([first, *record.notes])

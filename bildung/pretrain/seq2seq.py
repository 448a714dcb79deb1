"""Sequence to sequence: learn to answer a source with a target.

    pairs       rows of source and target; or a source's text and, from `target_data`, that of the row with the same key
    spans       prose with spans cut out, and what stood there (T5: data/span_corruption.py)
    denoising   damaged prose, and the whole (BART: data/denoising.py)

At the end held-out sources are answered, and the answers scored beside two that know nothing (see answering.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bildung.core.errors import SettingsError, nearest
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.batches import Shuffled, num_targets
from bildung.data.bucketing import Bucketed
from bildung.data.denoising import denoising_examples
from bildung.data.examples import Examples
from bildung.data.rows import Rows
from bildung.data.seq2seq import (
    Seq2SeqBatch,
    Seq2SeqExample,
    SourceTarget,
    encode_source,
    joined,
    pad_seq2seq,
    pairs,
    seq2seq_examples,
)
from bildung.data.sources import fingerprint
from bildung.data.span_corruption import span_examples
from bildung.data.text import documents
from bildung.model.store import LanguageModel, write_model
from bildung.pretrain.answering import METRICS, answers_to, scored
from bildung.pretrain.birth import Birth, begin, set_aside
from bildung.train.fit import mean_loss
from bildung.train.loss import Objective
from bildung.train.scheduled_sampling import NumberedBatches, ScheduledSampling
from bildung.train.seq2seq import seq2seq as objective
from bildung.train.training import Batches, check_ranges, run, steps_of

HELD_AT_ONCE = 64  # rows of a batch on which the held-out loss is measured


@settings_class
class Settings(Birth):
    """Learning to answer a source with a target."""

    objective: Literal["pairs", "spans", "denoising"] = "pairs"  # what the rows are made into
    target_data: str | None = None  # pairs: where the targets are, in rows that agree with those of `data` in `key`
    key: str = "id"  # the column that both have
    max_target: int | None = None  # tokens of a target; default: max_length
    batch_tokens: int | None = None  # batches of so many tokens, padding counted, of rows of one length; no batch_size
    label_smoothing: float = 0.0  # share of the target's weight that is spread over all tokens (the 2017 paper: 0.1)
    # how the share of true tokens among what the decoder reads falls while it learns; the others are its own guesses
    scheduled_sampling: Literal["none", "linear", "inverse_sigmoid"] = "none"
    least_true: float = 0.5  # scheduled sampling: the share at the end
    test: str | None = None  # pairs to answer at the end; default: those held out
    answers: int = 500  # so many of them at most
    metrics: tuple[str, ...] = ("bleu", "chrf")  # of the answers: bleu chrf ter wer cer per exact_match
    length_edges: tuple[int, ...] = ()  # also by length of the source in tokens: 6 9 makes "<=6", "7-9" and ">=10"
    beams: int = 1  # width of the search for an answer; 1: greedy


def seq2seq(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train a model that has `given` (encoder-decoder, recurrent seq2seq); `out` becomes a model directory.

    Raises SettingsError, DataError, ConfigError (see birth.begin), TokenizerError (see data/) and TrainingError.
    """
    source = Path(source)
    check_ranges(settings)
    check(settings)

    def work(job: Job) -> None:
        lm = begin(source, settings, kinds=("encoder-decoder", "seq2seq"))
        texts: Rows[Any] = _rows(settings)
        kept, aside = set_aside(list(texts), settings.held_out, settings.seed)
        examples, held = examples_of(lm, kept, settings), examples_of(lm, aside, settings) if aside else []
        pad_id = lm.tokenizer.pad_id
        held_batches = [pad_seq2seq(held[at : at + HELD_AT_ONCE], pad_id) for at in range(0, len(held), HELD_AT_ONCE)]
        batches, learn = _learning(_batches(examples, settings, pad_id), settings)
        run(
            job,
            lm.model,
            settings,
            batches,
            learn,
            what=f"{len(examples)} {settings.objective}, {num_targets(one.target for one in examples):,} tokens",
            held_out=held_batches,
            notes=[*([f"{settings.data}: {report}"] if (report := texts.report()) else []), *examples.notes],
        )
        if held:
            job.measured["held_out_nats_per_token"] = mean_loss(lm.model, objective, held_batches)["loss"]
        if settings.objective == "pairs":
            asked = list(pairs(settings.test, limit=settings.answers)) if settings.test else aside[: settings.answers]
            if asked and settings.metrics:
                _answer(job, lm, asked, kept, settings)
        lm.model.compute_dtype = None
        write_model(lm, job.out)

    given = [name for name in (settings.data, settings.target_data, settings.test) if name]
    data = {name: digest for one in given for name, digest in fingerprint(one).items()}
    return perform("pretrain seq2seq", source, out, settings, work, data=data, force=force)


def check(given: Settings) -> None:
    """Raises SettingsError for settings that do not go together."""
    for name in ("max_target", "batch_tokens", "answers", "beams"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise SettingsError(f"{name} = {value}; it must be a whole number from 1.")
    for name in given.metrics:
        if name not in METRICS:
            raise SettingsError(
                f"no metric {name!r} of answers; there are: {', '.join(METRICS)}. {nearest(name, METRICS)}"
            )
    if given.objective != "pairs" and (given.target_data or given.test):
        raise SettingsError(f"objective {given.objective!r} makes its own targets; leave target_data and test out.")


def _rows(given: Settings) -> Rows[Any]:
    if given.objective != "pairs":
        return documents(given.data, limit=given.limit)
    if given.target_data is not None:
        return joined(given.data, given.target_data, given.key, limit=given.limit)
    return pairs(given.data, limit=given.limit)


def examples_of(lm: LanguageModel, texts: Sequence[Any], given: Settings) -> Examples[Seq2SeqExample]:
    """Texts, or pairs of them, as what the model reads and says."""
    tokenizer, start = lm.tokenizer, lm.config.decoder_start_token_id
    if given.objective == "pairs":
        return seq2seq_examples(tokenizer, texts, start, given.max_length, given.max_target)
    make = span_examples if given.objective == "spans" else denoising_examples
    return make(tokenizer, texts, start, given.max_length, given.seed)


def _batches(
    examples: Sequence[Seq2SeqExample], given: Settings, pad_id: int | None
) -> Shuffled[Seq2SeqExample, Seq2SeqBatch] | Bucketed[Seq2SeqExample, Seq2SeqBatch]:
    if given.batch_tokens is not None:
        return Bucketed(examples, given.batch_tokens, given.seed, partial(pad_seq2seq, pad_id=pad_id, multiple=1))
    return Shuffled(examples, given.batch_size, given.seed, partial(pad_seq2seq, pad_id=pad_id))


def _learning(batches: Batches, given: Settings) -> tuple[Batches, Objective]:
    """Batches and objective: teacher forcing, or scheduled sampling over all of the steps."""
    if given.scheduled_sampling == "none":
        return batches, partial(objective, smoothing=given.label_smoothing)
    steps = steps_of(given, batches.batches_per_epoch)
    learn = ScheduledSampling(given.scheduled_sampling, steps, given.least_true, smoothing=given.label_smoothing)
    return NumberedBatches(batches, given.micro_steps), learn


def _answer(
    job: Job, lm: LanguageModel, asked: Sequence[SourceTarget], learned: Sequence[SourceTarget], given: Settings
) -> None:
    """Let the model answer and fill in the job's figures, and a few answers for people to read."""
    ids = [encode_source(lm.tokenizer, one.source)[: given.max_length] for one in asked]
    answers = answers_to(lm, ids, given.max_target or given.max_length, given.beams)
    lengths = list(map(len, ids))
    job.measured |= scored(given.metrics, answers, asked, learned, lengths, given.length_edges)
    shown = zip(asked[:8], answers, strict=False)
    job.after["samples"] = [{"prompt": one.source, "answer": answer} for one, answer in shown]

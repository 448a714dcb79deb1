"""Prefix language modelling: one stack of blocks reads a beginning in both directions and writes the rest.

    prose     every piece of a text is cut at a random place: what is before it is read, what is after it is learned
    pairs     the source is read, the target learned: what an encoder-decoder does, without a second stack

`out` is of model_type `bildung` with `prefix_lm` in its config.json (see model/prefix_lm.py): `generate`, `chat`,
`evaluate` and later tuning read their prompts as they were read here, and programs that would not refuse it.

At the end the held-out loss stands beside that of the same model when it reads the beginning from left to right only:
what it makes of seeing it whole.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.batches import Example, Shuffled, num_targets, pack
from bildung.data.examples import Examples
from bildung.data.prefix_lm import PrefixBatch, pad_prefix, prefix_examples, source_prefix_examples
from bildung.data.rows import Rows
from bildung.data.seq2seq import pairs
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.model.prefix_lm import PrefixKind, make_prefix_lm
from bildung.model.store import LanguageModel, write_model
from bildung.pretrain.birth import Birth, begin, set_aside
from bildung.train.fit import mean_loss
from bildung.train.prefix_lm import prefix_lm
from bildung.train.training import check_ranges, run

KINDS: dict[str, PrefixKind] = {"prose": "text", "pairs": "source"}
HELD_AT_ONCE = 32  # rows of a batch on which the held-out loss is measured


@settings_class
class Settings(Birth):
    """Prefix language modelling."""

    rows: Literal["prose", "pairs"] = "prose"  # what `data` holds: rows with `text`, or with `source` and `target`
    label_smoothing: float = 0.0  # share of the target's weight that is spread over all tokens


def prefix(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train a decoder whose beginnings are read in both directions; `out` becomes a model directory.

    Raises SettingsError, DataError, ConfigError (see birth.begin and model/prefix_lm.py) and TrainingError (see fit).
    """
    source = Path(source)
    check_ranges(settings)

    def work(job: Job) -> None:
        lm = begin(source, settings, kinds=("decoder",))
        family, wanted = lm.config.model_type, KINDS[settings.rows]
        if lm.config.prefix_lm != wanted:
            make_prefix_lm(lm.model, wanted)
            lm = replace(lm, config=lm.model.config)
            job.notes.append(f"a {family} before; written as model_type 'bildung' with prefix_lm = {wanted!r}")
        texts: Rows[Any] = (documents if settings.rows == "prose" else pairs)(settings.data, limit=settings.limit)
        kept, aside = set_aside(list(texts), settings.held_out, settings.seed)
        examples = _examples(lm, kept, settings)
        held = _examples(lm, aside, settings) if aside else []
        pad_id = lm.tokenizer.pad_id
        held_batches = [
            pad_prefix([[one] for one in held[at : at + HELD_AT_ONCE]], pad_id, packed=False)
            for at in range(0, len(held), HELD_AT_ONCE)
        ]
        packed = pack(examples, settings.max_length)
        run(
            job,
            lm.model,
            settings,
            Shuffled(packed, settings.batch_size, settings.seed, partial(pad_prefix, pad_id=pad_id, packed=True)),
            partial(prefix_lm, smoothing=settings.label_smoothing),
            what=f"{len(examples)} {settings.rows}, {num_targets(examples):,} tokens to learn",
            held_out=held_batches,
            notes=[*([f"{settings.data}: {report}"] if (report := texts.report()) else []), *examples.notes],
        )
        if held_batches:
            blind = [replace(batch, prefix_BL=torch.zeros_like(batch.prefix_BL)) for batch in held_batches]
            for name, batches in (("", held_batches), ("_read_left_to_right", blind)):
                job.measured[f"held_out_nats_per_token{name}"] = _loss(lm, batches)
            whole, left = (job.measured[f"held_out_nats_per_token{name}"] for name in ("", "_read_left_to_right"))
            print(
                f"held out: {whole:.3f} nats per token (prompts read from left to right only: {left:.3f})",
                file=sys.stderr,
            )
        lm.model.compute_dtype = None
        write_model(lm, job.out)

    return perform("pretrain prefix", source, out, settings, work, data=fingerprint(settings.data), force=force)


def _examples(lm: LanguageModel, texts: list[Any], given: Settings) -> Examples[Example]:
    if given.rows == "prose":
        return prefix_examples(lm.tokenizer, texts, given.max_length, given.seed)
    return source_prefix_examples(lm.tokenizer, texts, given.max_length)


def _loss(lm: LanguageModel, batches: list[PrefixBatch]) -> float:
    return mean_loss(lm.model, prefix_lm, batches)["loss"]

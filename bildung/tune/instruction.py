"""Instruction tuning, whatever is trained: conversations -> examples -> batches -> fit -> a directory with its record.

Only what the assistant said, with its end-of-turn token, is learned; the rest is read. `tune full` and `tune lora`
differ in which parameters train and how the result is written; everything else is here.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings
from bildung.data.batches import Batch, Example, Shuffled, chat_examples, num_targets, pack, pad, pad_packed
from bildung.data.sources import fingerprint
from bildung.data.text import conversations
from bildung.evaluate import card
from bildung.evaluate.card import CardSettings
from bildung.model import adapter_file
from bildung.model.store import LanguageModel, load
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.fit import fit, mean_loss
from bildung.train.objectives import clm
from bildung.train.optim import ScheduleName, adamw, schedule

COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}


@settings
class Tuning:
    """What every kind of instruction tuning can be told."""

    data: str  # conversations: a file, a folder, nursery:NAME, mini:NAME or hub:OWNER/NAME
    limit: int | None = None  # use only the first so many conversations
    held_out: int = 0  # conversations kept out of training, to measure the loss on
    max_length: int = 512  # tokens per row; longer conversations are cut
    pack: bool = True  # several conversations per row, each seeing only itself; False: one per row, padded
    steps: int | None = None  # optimizer steps; default: as many as epochs take
    epochs: float | None = None  # passes over the data; default: 1
    batch_size: int = 4  # rows per micro-step
    micro_steps: int = 1  # micro-steps whose gradients are summed into one optimizer step
    learning_rate: float = 2e-4  # at the top of the schedule
    schedule: ScheduleName = "cosine"  # course of the learning rate after the warmup
    warmup: float = 0.03  # share of the steps in which the learning rate rises
    weight_decay: float = 0.0  # of matrices; vectors are never decayed
    clip: float | None = 1.0  # largest norm of the gradient
    precision: Literal["bf16", "fp32"] = "bf16"  # of activations; what trains is kept in float32 either way
    seed: int = 0  # decides the first values, the order of the data, and dropout
    evaluate_every: int = 0  # steps between measurements of the held-out loss
    patience: int | None = None  # stop after so many measurements without a lower loss, and keep the best weights
    checkpoint_every: int = 10  # steps between checkpoints; a killed run goes on from the last
    tensorboard: Path | None = None  # folder for TensorBoard's event files
    card: CardSettings | None = None  # measure these tasks before and after


@dataclasses.dataclass
class TrainingData:
    """What training draws from."""

    batch_at: Shuffled[Sequence[Example], Batch]
    held_out: list[Batch]
    notes: list[str]  # what was dropped or cut, and why
    examples: int
    tokens: int  # of one pass, without padding
    targets: int  # those of them that are learned


def tune(
    operation: str,
    source: Path,
    out: Path,
    given: Tuning,
    work: Callable[[Job], None],
    force: bool,
) -> Record:
    """`perform` with the cards around `work`, which trains and writes into job.out."""
    source = Path(source)
    check_ranges(given)
    if given.steps is not None and given.epochs is not None:
        raise SettingsError(f"steps = {given.steps} and epochs = {given.epochs} were given; give one of them.")
    if given.evaluate_every and not given.held_out:
        raise SettingsError(f"evaluate_every = {given.evaluate_every} needs held_out conversations to measure on.")

    def whole(job: Job) -> None:
        if given.card is not None:
            card.before(job, load(source), given.card)
        work(job)
        if given.card is not None:
            card.after(job, load(job.out), given.card)  # what is on the disk is what is measured

    return perform(
        operation, source, out, given, whole, data=fingerprint(given.data), companions=base_of(source), force=force
    )


def check_ranges(given: Tuning) -> None:
    """Raises SettingsError for a number out of range, before any model is loaded.

    A clip of 0 would learn nothing, a negative one climb the loss, and neither would say so.
    """
    for names, fits, allowed in (
        ("steps batch_size micro_steps patience", lambda number: number >= 1, "at least 1"),
        ("epochs learning_rate clip", lambda number: 0 < number < math.inf, "above 0 and finite"),
        ("weight_decay", lambda number: 0 <= number < math.inf, "at least 0 and finite"),
        ("held_out evaluate_every checkpoint_every", lambda number: number >= 0, "at least 0"),
        ("warmup", lambda number: 0 <= number <= 1, "between 0 and 1, a share of the steps"),
        ("seed", lambda number: -(2**63) <= number < 2**63, "a number of at most 64 bits"),
    ):
        for name in names.split():
            value = getattr(given, name)
            if value is not None and not fits(value):
                raise SettingsError(f"{name} = {value} was given; it must be {allowed}.")


def base_of(source: Path) -> dict[str, Path]:
    """{"base": directory} when `source` is an adapter: its own files do not say what its base holds. Else {}."""
    if not (source / adapter_file.CONFIG).exists():
        return {}
    return {"base": adapter_file.find_base(source, adapter_file.read_config(source))}


def train(job: Job, lm: LanguageModel, given: Tuning) -> None:
    """Train what requires gradients in `lm` and fill in the job's numbers. Goes on from a checkpoint in job.out."""
    lm.model.compute_dtype = COMPUTE[given.precision]
    data = prepare(lm.tokenizer, given)
    one_pass = data.batch_at.batches_per_epoch / given.micro_steps
    steps = math.ceil(one_pass * (1 if given.epochs is None else given.epochs)) if given.steps is None else given.steps
    trainable = sum(parameter.numel() for parameter in lm.model.parameters() if parameter.requires_grad)
    print(
        f"{job.operation}: {data.examples} conversations, {data.tokens} tokens, {data.targets} of them trained; "
        f"{trainable:,} trainable parameters; {steps} steps of "
        f"{given.batch_size * given.micro_steps} rows of at most {given.max_length} tokens",
        *data.notes,  # what was dropped or cut, and why
        sep="\n  ",
        file=sys.stderr,
    )
    history = fit(
        lm.model,
        data.batch_at,
        clm,
        adamw(lm.model, given.learning_rate, weight_decay=given.weight_decay),
        steps=steps,
        micro_steps=given.micro_steps,
        schedule=schedule(given.schedule, steps, round(given.warmup * steps)),
        clip=given.clip,
        seed=given.seed,
        evaluate=partial(mean_loss, objective=clm, batches=data.held_out) if data.held_out else None,
        evaluate_every=given.evaluate_every,
        patience=given.patience,
        out=job.out,
        checkpoint_every=given.checkpoint_every,
        tensorboard=given.tensorboard,
        title=job.operation,
    )
    job.tokens_seen, job.trained_tokens = history.tokens_seen, history.trained_tokens
    job.notes += data.notes
    job.measured |= {
        "trainable_parameters": trainable,
        "examples": data.examples,
        "tokens_per_epoch": data.tokens,
        "targets_per_epoch": data.targets,
        "epochs": history.steps / one_pass,
        **history.summary(),
    }
    if history.steps < steps:
        job.notes.append(f"stopped after step {history.steps} of {steps}: the held-out loss fell no further")


def prepare(tokenizer: Tokenizer, given: Tuning) -> TrainingData:
    """Read, encode and pack the conversations. Raises DataError when none is left to train on."""
    examples = chat_examples(tokenizer, conversations(given.data, limit=given.limit), given.max_length)
    if not 0 <= given.held_out < len(examples):
        raise DataError(
            f"held_out = {given.held_out} of {len(examples)} usable conversations; at least one must stay to train on."
        )
    chosen = set(random.Random(f"held out {given.seed}").sample(range(len(examples)), given.held_out))
    kept = [example for index, example in enumerate(examples) if index not in chosen]
    aside = [examples[index] for index in sorted(chosen)]
    rows = pack(kept, given.max_length) if given.pack else [[example] for example in kept]
    collate = partial(_collate, pad_id=tokenizer.pad_id, packed=given.pack)
    return TrainingData(
        batch_at=Shuffled(rows, given.batch_size, given.seed, collate),
        held_out=[pad(aside[start : start + 8], tokenizer.pad_id) for start in range(0, len(aside), 8)],
        notes=examples.notes,
        examples=len(kept),
        tokens=sum(len(example) for example in kept),
        targets=num_targets(kept),
    )


def _collate(rows: Sequence[Sequence[Example]], pad_id: int | None, packed: bool) -> Batch:
    return pad_packed(rows, pad_id) if packed else pad([row[0] for row in rows], pad_id)

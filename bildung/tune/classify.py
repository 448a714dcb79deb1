"""A text classifier: a head on an encoder's [CLS] or on a decoder's last token, trained together with the model.

    [CLS] a fine film [SEP] -> encoder -> state of [CLS] -> pooler -> one logit per class       Devlin et al. 2019, 4.1
    a fine film             -> decoder -> state of the last token  -> one logit per class       Radford et al. 2018, 3.2

    bildung tune classify lives/bert/base OUT --data nursery:imdb --test nursery:imdb/test

What is told of a text is one class, any number of labels, or a number (tune/told.py):

    problem         label column        head                loss                    figures
    single_label    "good"              softmax             -log p(class)           accuracy, F1, calibration
    multi_label     ["good", "long"]    sigmoid of each     binary cross-entropy    micro and macro F1, exact sets
    regression      3.5                 one number          squared error           MSE, Pearson, Spearman

What a model has of the head's parts is kept (BERT's pooler), the rest starts at random. The figures are of texts that
were not trained on, beside those of a guess that does not read (always the most frequent class). `tune classify_words`
lets a decoder write its answer instead.

The head always trains; method says what else does, all of the model or little of it (tune/classifier_methods.py, where
it is said what comes out, and what goes on a quantized SOURCE).

How much of what SOURCE knew of language is lost on the way is measured through its language head (tune/trunk.py): by
`--card`, and by `--forget-budget`, which ends the training, or mixes in `--rehearse`, in time (tune/forgetting.py).

The fewer numbers train, the larger the steps they need, so the default learning rate follows the method (RATES).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bildung.core import ranks
from bildung.core.errors import DataError, SettingsError
from bildung.core.hardware import Tidy
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.batches import Shuffled
from bildung.data.labelled import (
    Labelled,
    Problem,
    TextBatch,
    check_same_classes,
    encode_labelled,
    pad_texts,
    read_labelled,
    text_batches,
)
from bildung.data.sources import fingerprint
from bildung.evaluate import card
from bildung.evaluate.card import CardSettings
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.store import load
from bildung.tokens.frames import Cut, decoder_frame
from bildung.train.optim import ScheduleName
from bildung.train.training import COMPUTE, FROZEN, Batches, check_ranges
from bildung.tune.classifier_head import with_classifier
from bildung.tune.classifier_methods import RATES, Options, check, check_base, choose_trained, quantized, write
from bildung.tune.forgetting import Forgetting, budget_sources, check_budget, run_within_budget
from bildung.tune.rehearsing import Rehearsing, nothing_raised
from bildung.tune.told import TOLD
from bildung.tune.trunk import WithTexts, for_card, speaking, text_batches_of


@settings_class
class Settings(Forgetting, Options):
    """Text classification."""

    data: str  # rows with a text and its class
    problem: Problem = "single_label"  # what is told of a text: one class, any number of labels, or a number
    test: str | None = None  # rows to measure on; default: those of `held_out`
    held_out: int = 0  # rows kept out of training, to measure on; as large a share of each class
    limit: int | None = None  # use only the first so many rows
    text: str = "text"  # column of the text
    second: str | None = None  # column of a second text, for pairs to be judged together
    label: str = "label"  # column of the class, a number or a name; of the list of labels; of the number
    max_length: int = 128  # tokens of a text, special ones included; longer ones are cut
    cut: Cut = "end"  # where: at the end, or in the middle, a quarter of what is left being from the beginning
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    balance: bool = False  # rare classes weigh more, so that all count the same
    learning_rate: float | None = None  # type: ignore[assignment]
    """At the top of the schedule; default: full 5e-5, lora 5e-4, head, bitfit and adapter 1e-3, ia3 3e-3,
    prompt and prefix 1e-2."""
    schedule: ScheduleName = "linear"  # course of the learning rate after the warmup
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.01  # of matrices; vectors are never decayed
    batch_size: int = 32  # texts per micro-step
    checkpoint_every: int = 100  # steps between checkpoints; a killed run goes on from the last
    card: CardSettings | None = None  # measure these tasks before and after; a decoder's, through its language head
    rehearse: str | None = None  # general texts to mix in, more and more, before the budget makes an end


def classify(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train a classifier; `out` becomes a model directory that transformers opens as ...ForSequenceClassification, or
    an adapter directory (see above).

    Raises SettingsError, DataError and TrainingError, each saying what does not fit.
    """
    source, told = Path(source), TOLD[settings.problem]
    if settings.learning_rate is None:
        settings = replace(settings, learning_rate=RATES[settings.method])
    check_ranges(settings)
    told.check(settings.label_smoothing, settings.balance)
    if settings.test is None and settings.evaluate_every and not settings.held_out:
        raise SettingsError(f"evaluate_every = {settings.evaluate_every} needs texts to measure on: give held_out.")
    if settings.cut == "middle" and settings.second is not None:
        raise SettingsError("cut = middle is for single texts; of two the longer one is cut at its end. Leave it out.")
    check(settings)
    check_budget(settings, settings.card)

    def work(job: Job) -> None:
        lm = load(source)
        dtype, is_quantized = lm.model.weight_dtype, bool(quantized(lm.model))
        del lm  # its file would be mapped beside the next one's
        # What trains is float32. Quantized matrices do not, and are dequantized to what the activations run in.
        lm = load(source, FROZEN[settings.precision] if is_quantized else "float32")
        if lm.config.kind not in ("encoder", "decoder", "classifier"):
            raise DataError(
                f"{source} is a {lm.config.model_type} of kind {lm.config.kind!r}; an encoder or a decoder is needed."
            )
        check_base(lm, source, settings.method)
        if settings.card is not None and ranks.rank() == 0:
            card.before(job, for_card(load(source), source), settings.card)
        data = read(settings, settings.data, None)
        train, aside = split(data, settings)
        final = aside
        if settings.test is not None:
            final = read(settings, settings.test, data.classes)
            if settings.problem != "regression":
                job.notes += check_same_classes(settings.data, settings.test, final, settings.limit)
        lm = with_classifier(job, lm, data.classes, settings.seed, settings.problem)
        choose_trained(lm, settings, settings.seed)
        frame = decoder_frame(lm.tokenizer) if lm.config.kind == "classifier" else None
        longest, pad_id = min(settings.max_length, lm.config.max_position_embeddings), lm.tokenizer.pad_id
        encoded = {
            name: encode_labelled(lm.tokenizer, part, longest, frame, settings.cut)
            for name, part in (("train", train), ("aside", aside), ("final", final))
            if part is not None
        }
        lm.model.compute_dtype = COMPUTE[settings.precision]
        objective = told.objective(text_logits, train, settings.label_smoothing, settings.balance)
        cut = sum(len(framed.tokens) == longest for framed, _ in encoded["train"])
        at_once = min(64, settings.batch_size)  # measuring is to take no more memory than training
        collate = partial(pad_texts, pad_id=pad_id)
        batch_at: Batches = Shuffled(encoded["train"], settings.batch_size, settings.seed, collate)
        raised = nothing_raised()
        if settings.rehearse is not None:
            speaker = speaking(lm, source)
            old = text_batches_of(speaker, settings.rehearse, longest, settings.batch_size, settings.seed)
            batch_at, objective = Rehearsing(batch_at, old, raised), WithTexts(objective, speaker.model)
        run_within_budget(
            job,
            lm,
            settings,
            batch_at,
            objective,
            measured=settings.card,
            raised=raised,
            what=f"{len(train):,} texts {told.what(data.classes)}, {cut:,} of them filling {longest} tokens",
            held_out=list(text_batches(encoded.get("aside", []), at_once, pad_id)),
            notes=data.notes,
        )
        if final is not None:
            logits_NC = all_logits(lm.model, text_batches(encoded["final"], at_once, pad_id))
            job.measured |= told.figures(logits_NC, train, final)
            print(told.shown(job.measured))
        lm.model.compute_dtype = None
        write(lm, settings.method, job.out, dtype)
        if settings.card is not None and ranks.rank() == 0:
            card.after(job, for_card(load(job.out), source), settings.card)

    data = fingerprint(settings.data) | (fingerprint(settings.test) if settings.test is not None else {})
    data |= budget_sources(settings)
    return perform("tune classify", source, out, settings, work, data=data, force=force)


def text_logits(model: Any, batch: TextBatch) -> Tensor:
    """The logits BC of a batch of texts."""
    if isinstance(model, DecoderClassifier):
        return model(batch.tokens_BL, keep_BL=batch.keep_BL)
    logits_BC: Tensor = model.classes(batch.tokens_BL, keep_BL=batch.keep_BL, types_BL=batch.types_BL)
    return logits_BC


@torch.no_grad()
def all_logits(model: Any, batches: Iterable[TextBatch]) -> Tensor:
    """The logits of every text, NC, float32."""
    model.eval()
    found, tidy = [], Tidy()
    for batch in batches:
        found.append(text_logits(model, batch.to(model.device)).float().cpu())
        tidy()
    return torch.cat(found)


def read(settings: Settings, source: str, classes: Sequence[str] | None) -> Labelled:
    """The labelled texts of a source, from the columns that the settings name."""
    columns: dict[str, Any] = {"text": settings.text, "second": settings.second, "label": settings.label}
    return read_labelled(source, limit=settings.limit, classes=classes, problem=settings.problem, **columns)


def split(data: Labelled, settings: Settings) -> tuple[Labelled, Labelled | None]:
    """(texts to train on, those held out)."""
    return data.set_aside(settings.held_out, settings.seed) if settings.held_out else (data, None)

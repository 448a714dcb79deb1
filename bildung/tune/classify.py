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

The head always trains. method says what else does:

    full, lora, ia3, bitfit    all of the model, or what is added to its layers, which is merged: the result is an
                               ordinary directory
    prompt, prefix             virtual tokens before every text (model/virtual.py): the result is an adapter directory
                               on SOURCE, with the head in it; peft opens it

The fewer numbers train, the larger the steps they need, so the default learning rate follows the method (RATES).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

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
from bildung.model import adapter_file
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.store import LanguageModel, load, write_model
from bildung.tokens.frames import Cut, decoder_frame
from bildung.train.optim import ScheduleName
from bildung.train.training import COMPUTE, Training, check_ranges, check_trainable, run
from bildung.tune import bitfit, ia3, lora, prefix, prompt
from bildung.tune.classifier_head import with_classifier
from bildung.tune.ia3 import Options as Ia3
from bildung.tune.lora import Options as Lora
from bildung.tune.merge import fold_deltas
from bildung.tune.prefix import Options as Prefix
from bildung.tune.prompt import Options as Prompt
from bildung.tune.told import TOLD

# full: the largest that BERT's authors tried (their appendix A.3). lora: RoBERTa on SST-2 and MNLI (Hu et al. 2021,
# table 9). The others: as in the files of these methods.
RATES = {"full": 5e-5, "lora": 5e-4, "ia3": 3e-3, "bitfit": 1e-3, "prompt": 1e-2, "prefix": 1e-2}
VIRTUAL = ("prompt", "prefix")  # methods that are kept as an adapter, since nothing of them can be merged


@settings_class
class Settings(Training):
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
    method: Literal["full", "lora", "ia3", "bitfit", "prompt", "prefix"] = "full"  # what trains beside the head
    lora: Lora = Lora()  # method lora: the low-rank deltas
    ia3: Ia3 = Ia3()  # method ia3: what is rescaled
    prompt: Prompt = Prompt()  # method prompt: the vectors before every text
    prefix: Prefix = Prefix()  # method prefix: the keys and values before every text's
    learning_rate: float | None = None  # type: ignore[assignment]
    """At the top of the schedule; default: full 5e-5, lora 5e-4, bitfit 1e-3, ia3 3e-3, prompt and prefix 1e-2."""
    schedule: ScheduleName = "linear"  # course of the learning rate after the warmup
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.01  # of matrices; vectors are never decayed
    batch_size: int = 32  # texts per micro-step
    checkpoint_every: int = 100  # steps between checkpoints; a killed run goes on from the last


def classify(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train a classifier; `out` becomes a model directory that transformers opens as ...ForSequenceClassification.

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
    check_method(settings)

    def work(job: Job) -> None:
        lm = load(source, "float32")
        if lm.config.kind not in ("encoder", "decoder", "classifier"):
            raise DataError(
                f"{source} is a {lm.config.model_type} of kind {lm.config.kind!r}; an encoder or a decoder is needed."
            )
        check_trainable(lm, source)
        dtype = load(source).model.weight_dtype
        data = read(settings, settings.data, None)
        train, aside = split(data, settings)
        final = aside
        if settings.test is not None:
            final = read(settings, settings.test, data.classes)
            if settings.problem != "regression":
                job.notes += check_same_classes(settings.data, settings.test, final, settings.limit)
        lm = with_classifier(job, lm, data.classes, settings.seed, settings.problem)
        if settings.method in VIRTUAL:
            add_virtual_tokens(lm, settings)
        else:
            choose_trained(lm.model, settings)
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
        run(
            job,
            lm.model,
            settings,
            Shuffled(encoded["train"], settings.batch_size, settings.seed, partial(pad_texts, pad_id=pad_id)),
            objective,
            what=f"{len(train):,} texts {told.what(data.classes)}, {cut:,} of them filling {longest} tokens",
            held_out=list(text_batches(encoded.get("aside", []), at_once, pad_id)),
            notes=data.notes,
        )
        if final is not None:
            logits_NC = all_logits(lm.model, text_batches(encoded["final"], at_once, pad_id))
            job.measured |= told.figures(logits_NC, train, final)
            print(told.shown(job.measured))
        lm.model.compute_dtype = None
        if settings.method in VIRTUAL:
            prefix.drop_mlp(lm)
            lm.tokenizer.save(job.out)
            adapter_file.write(lm.model, job.out, base=source)
            return
        if settings.method == "full":
            lm.model.to(dtype)
        else:
            fold_deltas(lm.model, dtype)
        write_model(lm, job.out)

    data = fingerprint(settings.data) | (fingerprint(settings.test) if settings.test is not None else {})
    return perform("tune classify", source, out, settings, work, data=data, force=force)


def check_method(settings: Settings) -> None:
    """Raises SettingsError for settings of a method that is not the chosen one."""
    lora.check(settings.lora)
    for name, usual in (("lora", Lora()), ("ia3", Ia3()), ("prompt", Prompt()), ("prefix", Prefix())):
        if settings.method != name and getattr(settings, name) != usual:
            raise SettingsError(f"settings of {name} were given, and method is {settings.method!r}; set method {name}.")


def choose_trained(model: Any, settings: Settings) -> None:
    """Let the head and what the method adds to the layers or names require gradients, nothing else."""
    if settings.method == "full":
        model.requires_grad_(True)
        return
    if settings.method == "lora":
        given = settings.lora
        target = "*.layers.*" if given.target == "all" else given.target  # the head trains whole
        lora.add_lora(model, replace(given, target=target, seed=given.seed or settings.seed))
    elif settings.method == "ia3":
        ia3.add_ia3(model, settings.ia3)
    else:
        bitfit.add_bitfit(model, bitfit.Options())
    _train_head(model)


def add_virtual_tokens(lm: LanguageModel, settings: Settings) -> None:
    """Put the method's virtual tokens before the model; they and the head require gradients, nothing else."""
    if settings.method == "prompt":
        prompt.add_prompt(lm, replace(settings.prompt, seed=settings.prompt.seed or settings.seed))
    else:
        prefix.add_prefix(lm, replace(settings.prefix, seed=settings.prefix.seed or settings.seed))
    _train_head(lm.model)


def _train_head(model: Any) -> None:
    for head in ("score", "classifier", "pooler"):
        if getattr(model, head, None) is not None:
            getattr(model, head).requires_grad_(True)


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

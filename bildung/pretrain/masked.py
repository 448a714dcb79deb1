"""Masked-language modelling from nothing, with next-sentence prediction beside it: how BERT is made.

    tokenizer directory + config keys + documents  ->  pairs of segments, some tokens hidden  ->  an encoder

    bildung pretrain masked words bert --data nursery:sotu --model bert_tiny.yaml --max-length 64 --steps 1500

Beside the figures on documents that were set aside stand those of two models that learn nothing: the most frequent
token at every masked place, the more frequent label for every pair.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.batches import pack
from bildung.data.masking import DynamicMasks, MaskedBatch, Masker, Sentences, mask_generator, pad_sentences, pieces
from bildung.data.sentence_pairs import Pairs, make_pairs, sentences
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.model.config import from_dict
from bildung.model.names import family_of
from bildung.model.store import LanguageModel, write_model
from bildung.pretrain.birth import Birth, begin, set_aside
from bildung.tokens.frames import Frame, frame_of
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.fit import Objective, mean_loss
from bildung.train.masked import mlm, mlm_nsp
from bildung.train.optim import ScheduleName
from bildung.train.training import check_ranges, run

HEADS = {"mlm": ("mlm",), "mlm+nsp": ("pooler", "mlm", "nsp"), "mlm+sop": ("pooler", "mlm", "nsp")}


@settings_class
class Settings(Birth):
    """Masked-language modelling."""

    document_rows: int = 1  # so many rows in a row are one document: more than one where rows are verses or lines
    objective: Literal["mlm", "mlm+nsp", "mlm+sop"] = (
        "mlm+nsp"  # alone, with next-sentence or sentence-order prediction
    )
    share: float = 0.15  # of the tokens that are to be predicted
    whole_words: bool = False  # hide all pieces of a word or none
    copies: int = 2  # how many times the documents are cut into pairs, each time otherwise
    short: float = 0.1  # share of pairs that are shorter than max_length on purpose
    pack: bool = False  # mlm alone: several texts per row, each seeing only itself
    max_length: int = 128  # tokens of a row, special ones included
    learning_rate: float = 1e-3  # at the top of the schedule
    schedule: ScheduleName = "linear"  # course of the learning rate after the warmup
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.01  # of matrices; vectors are never decayed
    batch_size: int = 64  # rows per micro-step


def masked(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train an encoder on prose (rows with `text`, each a document); `out` becomes a model directory.

    Raises SettingsError, DataError, ConfigError (see birth.begin) and TrainingError (see fit).
    """
    source = Path(source)
    check(settings)

    def work(job: Job) -> None:
        lm = begin(source, with_class(settings), kinds=("encoder",))
        if lacking := [head for head in HEADS[settings.objective] if head not in lm.config.heads]:
            raise DataError(
                f"{source} has the heads {', '.join(lm.config.heads) or 'none'}; {settings.objective} needs also "
                f"{', '.join(lacking)}. Choose another objective, or begin from a tokenizer."
            )
        texts = documents(settings.data, limit=settings.limit)
        kept, aside = set_aside(joined(list(texts), settings.document_rows), settings.held_out, settings.seed)
        masker = Masker(lm.tokenizer, settings.share, whole_words=settings.whole_words)
        train = rows_of(lm.tokenizer, kept, settings, settings.copies)
        held = rows_of(lm.tokenizer, aside, settings, 1) if aside else []
        held_batches = fixed_batches(held, settings, masker, lm.tokenizer.pad_id)
        objective: Objective = mlm if settings.objective == "mlm" else mlm_nsp
        random_share = label_share(train)
        told = "" if random_share is None else f", {random_share:.3f} of them with label 1"
        run(
            job,
            lm.model,
            settings,
            DynamicMasks(
                train, settings.batch_size, settings.seed, partial(pad_sentences, pad_id=lm.tokenizer.pad_id), masker
            ),
            objective,
            what=f"{len(kept)} documents, {len(train):,} rows{told}",
            held_out=held_batches,
            notes=[f"{settings.data}: {report}"] if (report := texts.report()) else [],
        )
        job.measured |= {"documents": len(kept), "rows": len(train), "random_share": random_share}
        if held:
            found = mean_loss(lm.model, objective, held_batches)
            job.measured |= figures(found, train, held_batches, lm)
            print(shown(job))
        lm.model.compute_dtype = None
        write_model(lm, job.out)

    return perform("pretrain masked", source, out, settings, work, data=fingerprint(settings.data), force=force)


def check(settings: Settings) -> None:
    """Raises SettingsError for numbers out of range and settings that do not go together."""
    check_ranges(settings)
    for name, low, high in (("share", 0.0, 1.0), ("short", -1e-9, 1.0)):
        if not low < getattr(settings, name) < high:
            raise SettingsError(f"{name} = {getattr(settings, name)} was given; it must lie between 0 and 1.")
    for name in ("copies", "document_rows"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"{name} = {getattr(settings, name)} was given; at least 1.")
    if settings.held_out == 1 and settings.objective == "mlm+nsp":
        raise SettingsError("held_out = 1 was given; random sentences come from another document: give 0 or 2.")
    if settings.pack and settings.objective != "mlm":
        raise SettingsError(
            f"pack is for mlm alone; with {settings.objective} a row is one pair, and its [CLS] is first."
        )


def with_class(settings: Settings) -> Settings:
    """The settings whose `model`, if any, names transformers' class with the heads that the objective needs."""
    if settings.model is None or "architectures" in (keys := json.loads(settings.model)):
        return settings
    # The vocabulary's size comes from the tokenizer, later: any will do to tell the family.
    files = getattr(family_of(from_dict({"vocab_size": 2**20, **keys})), "FILES", None)
    if files is None:
        raise DataError(f"a {keys.get('model_type')} is no encoder; masked-language modelling needs one, such as bert.")
    keys["architectures"] = [files.class_with(HEADS[settings.objective])]
    return replace(settings, model=json.dumps(keys))


def joined(texts: Sequence[str], rows: int) -> list[str]:
    """Documents of so many texts each."""
    return [" ".join(texts[start : start + rows]) for start in range(0, len(texts), rows)]


def rows_of(tokenizer: Tokenizer, texts: Sequence[str], given: Settings, copies: int) -> list[list[Sentences]]:
    """What a batch is drawn from: rows of one pair, or, for mlm alone, of one text or several packed ones."""
    frame = frame_of(tokenizer)
    if given.objective == "mlm":
        cut = pieces((tokenizer.encode(text, bos=False) for text in texts), frame, given.max_length)
        return pack(cut, given.max_length) if given.pack else [[one] for one in cut]  # type: ignore[arg-type,return-value]
    split = [[tokenizer.encode(one, bos=False) for one in sentences(text)] for text in texts]
    return [[pair] for number in range(copies) for pair in _pairs(split, frame, given, number)]


def _pairs(split: Sequence[Sequence[Sequence[int]]], frame: Frame, given: Settings, number: int) -> Pairs:
    task: Literal["nsp", "sop"] = "nsp" if given.objective == "mlm+nsp" else "sop"
    return make_pairs(split, frame, given.max_length, seed=f"{given.seed} {number}", task=task, short=given.short)


def label_share(rows: Sequence[Sequence[Sentences]]) -> float | None:
    """The share of pairs with label 1 (a random or swapped second segment); None where there are no pairs."""
    labels = [one.label for row in rows for one in row if one.label is not None]
    return sum(labels) / len(labels) if labels else None


def fixed_batches(
    rows: Sequence[Sequence[Sentences]], given: Settings, masker: Masker, pad_id: int | None
) -> list[MaskedBatch]:
    """Batches to measure on, whose masks are always the same."""
    size = given.batch_size
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    seed = f"held out {given.seed}"
    return [masker(pad_sentences(part, pad_id), mask_generator(seed, n)) for n, part in enumerate(parts)]


def figures(
    found: dict[str, float], train: Sequence[Sequence[Sentences]], held: Sequence[MaskedBatch], lm: LanguageModel
) -> dict[str, float | str]:
    """What was measured on held-out documents, beside what always giving the most frequent answer gives."""
    special = set(lm.tokenizer.special_tokens.values())
    counts = Counter(token for row in train for one in row for token in one.tokens if token not in special)
    most = counts.most_common(1)[0][0]
    right = sum(int((batch.targets_BL[batch.chosen_BL] == most).sum()) for batch in held)
    loss = found.get("mlm_loss", found["loss"])
    made: dict[str, float | str] = {
        "mlm_accuracy": found["mlm_accuracy"],
        "majority_mlm_accuracy": right / sum(batch.num_targets for batch in held),
        "majority_token": lm.tokenizer.token_of(most),
        "mlm_perplexity": math.exp(min(loss, 700.0)),
        "held_out_targets": sum(batch.num_targets for batch in held),
    }
    labels = [label for batch in held if batch.labels_B is not None for label in batch.labels_B.tolist()]
    if labels:
        share = sum(labels) / len(labels)
        made |= {
            "nsp_accuracy": found["nsp_accuracy"],
            "majority_nsp_accuracy": max(share, 1 - share),
            "held_out_pairs": len(labels),
        }
    return made


def shown(job: Job) -> str:
    """The figures in words."""
    m = job.measured
    lines = [
        f"masked tokens: accuracy {m['mlm_accuracy']:.3f} (always {m['majority_token']!r}: "
        f"{m['majority_mlm_accuracy']:.3f}), perplexity {m['mlm_perplexity']:.1f}, {m['held_out_targets']:,} of them"
    ]
    if "nsp_accuracy" in m:
        lines.append(
            f"second segments: accuracy {m['nsp_accuracy']:.3f} (always the more frequent label: "
            f"{m['majority_nsp_accuracy']:.3f}), {m['held_out_pairs']:,} pairs"
        )
    return "\n".join(lines)

"""Causal language modelling from nothing: predict every token from those before it.

    data "nursery:brown"                       one source
    data "3*nursery:sotu + nursery:brown"      a mixture: of four rows, three come from the first
    data "lives/tokens"                        a directory made by `bildung pretrain tokenize`, encoded once

Rows are stretches of the encoded documents, in which each document sees only itself. The held-out loss is given in bits
per byte, which does not depend on the tokenizer, beside those of two models that only count, on the same tokens:
unigrams (how often each token occurs, add-one smoothed) and Kneser-Ney n-grams.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bildung.core import ranks
from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.augment import Augmentation, AugmentedBatches
from bildung.data.batches import Batch, Example, clm_examples, num_targets, pad, pad_packed
from bildung.data.mixture import Mixture, Phases
from bildung.data.sources import fingerprint
from bildung.data.token_files import DONE, TokenRows
from bildung.evaluate.card import card
from bildung.evaluate.ngram import Documents, kneser_ney_nats
from bildung.model.store import LanguageModel, write_model
from bildung.pretrain.birth import begin
from bildung.pretrain.meanwhile import Watched, check_looks, looks, samples
from bildung.pretrain.size import chosen, maximal_update
from bildung.pretrain.tokenize import encode, held_out_texts
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.fit import mean_loss
from bildung.train.loss import LossSum
from bildung.train.objectives import clm
from bildung.train.training import check_ranges, run, steps_of


@settings_class
class Settings(Watched):
    """Causal language modelling."""

    label_smoothing: float = 0.0  # share of each target that is spread over all tokens, in training only
    augment: Augmentation = Augmentation()  # text changed anew in every epoch (data/augment.py)
    curriculum: tuple[int, ...] = ()  # shorter rows before those of max_length, each for an equal share of the steps
    held_out_tokens: int = 65536  # of the documents set aside, measure on pieces of about so many tokens in all
    baseline_order: int = 5  # tokens of the longest n-gram of the Kneser-Ney baseline; 0: none


def causal(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train a causal model on prose (rows with `text`); `out` becomes a model directory.

    Raises SettingsError, DataError, ConfigError (see birth.begin) and TrainingError (see fit).
    """
    source = Path(source)
    check_ranges(settings)
    if not 0 <= settings.label_smoothing < 1:
        raise SettingsError(f"label_smoothing = {settings.label_smoothing} was given; it must lie in [0, 1).")
    parts = mixture_of(settings.data)
    settings, by_size = chosen(settings, source)

    def work(job: Job) -> None:
        lm = begin(source, settings, kinds=("decoder", "recurrent"))
        rates = maximal_update(lm, settings, newborn=not (source / "config.json").exists())
        check_looks(lm, settings)
        if by_size and ranks.rank() == 0:
            print(by_size, file=sys.stderr)
        folders = [_encoded(job, lm, name, number, settings) for number, name in enumerate(parts)]
        weights = list(parts.values())
        texts = [text for folder in folders for text in held_out_texts(folder)]
        held = _some(clm_examples(lm.tokenizer, texts, settings.max_length) if texts else [], settings.held_out_tokens)
        pad_id = lm.tokenizer.pad_id
        held_batches = [pad(held[start : start + 16], pad_id) for start in range(0, len(held), 16)]
        rows = [TokenRows(folder, settings.max_length) for folder in folders]
        run(
            job,
            lm.model,
            settings,
            _batches(folders, weights, settings, lm.tokenizer),
            partial(_objective, smoothing=settings.label_smoothing),
            what=f"{sum(one.tokens for one in rows):,} tokens in rows of {settings.max_length}",
            held_out=held_batches,
            notes=[f"{one.left_out} tokens fill no whole row and are left out" for one in rows if one.left_out],
            also=looks(lm, settings),
            rates=rates,
        )
        if texts:
            final = mean_loss(lm.model, clm, held_batches)["loss"]
            order, vocab_size = settings.baseline_order, lm.config.vocab_size
            train = [piece for one in rows for n in range(len(one)) for piece in one.pieces(n)] if order else []
            counts_V = np.sum([one.counts(vocab_size) for one in rows], axis=0)
            bytes_ = sum(len(lm.tokenizer.decode(_targets(piece), skip_special=True).encode()) for piece in held)
            job.measured |= held_out_figures(final, counts_V, held, bytes_, train, order)
            print(shown(job.measured))
        job.measured["tokens_per_epoch"] = sum(one.tokens for one in rows)
        if settings.card is not None:
            job.after = card(lm, settings.card)
        if settings.sample_prompts:
            job.after["samples"] = [*samples(lm, settings), *job.after.get("samples", [])]
        lm.model.compute_dtype = None
        write_model(lm, job.out)

    data = {name: digest for part in parts for name, digest in _fingerprint(part).items()}
    if settings.augment.synonyms:
        data |= fingerprint("nursery:wordnet")
    return perform("pretrain causal", source, out, settings, work, data=data, force=force)


def mixture_of(data: str) -> dict[str, float]:
    """Source -> weight of "3*nursery:sotu + nursery:brown". Raises SettingsError."""
    parts: dict[str, float] = {}
    for part in data.split(" + "):
        weight, star, name = part.strip().partition("*")
        if not star:
            weight, name = "1", part.strip()
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf or not name.strip() or name.strip() in parts:
            raise SettingsError(
                f"data = {data!r}: {part.strip()!r} is not understood; a mixture is written '3*SOURCE + SOURCE', with "
                f"weights above 0 and every source once."
            )
        parts[name.strip()] = number
    return parts


def _fingerprint(part: str) -> dict[str, str]:
    done = Path(part) / DONE
    return fingerprint(str(done)) if done.exists() else fingerprint(part)


def _encoded(job: Job, lm: LanguageModel, part: str, number: int, given: Settings) -> Path:
    """The token files of a source: where they are, or made in the place of work (where a kill leaves them)."""
    if (Path(part) / DONE).exists():
        return Path(part)
    folder = job.out / f".tokens-{number}"
    if ranks.rank() == 0:
        job.notes += encode(folder, lm.tokenizer, part, given.limit, given.held_out, given.seed)["notes"]
    ranks.told()  # the others wait for it
    return folder


def _batches(folders: Sequence[Path], weights: Sequence[float], given: Settings, tokenizer: Tokenizer) -> Any:
    """Batches of the mixture, its text changed where that is asked for."""
    batch_at = _unchanged(folders, weights, given, tokenizer.pad_id)
    return AugmentedBatches(batch_at, tokenizer, given.augment, given.seed) if given.augment.is_on else batch_at


def _objective(model: Any, batch: Batch, smoothing: float) -> LossSum:
    """clm, smoothed only where it trains: held-out losses are those of the model."""
    return clm(model, batch, smoothing if model.training else 0.0)


def _unchanged(folders: Sequence[Path], weights: Sequence[float], given: Settings, pad_id: int | None) -> Any:
    """Batches of the mixture; with a curriculum of as many tokens each, in more and shorter rows at first."""

    def of_length(length: int) -> Mixture[list[Example], Batch]:
        sources = [(TokenRows(folder, length), weight) for folder, weight in zip(folders, weights, strict=True)]
        rows = max(1, cast(int, given.batch_size) * given.max_length // length)
        return Mixture(sources, rows, given.seed, partial(_collate, pad_id=pad_id))

    whole = of_length(given.max_length)
    if not given.curriculum:
        return whole
    if any(not 2 <= length < given.max_length for length in given.curriculum):
        raise SettingsError(
            f"curriculum = {given.curriculum}; lengths from 2 to below max_length = {given.max_length} are needed."
        )
    steps = steps_of(given, whole.batches_per_epoch)
    share = max(1, steps * cast(int, given.micro_steps) // (len(given.curriculum) + 1))
    return Phases([*((share, of_length(length)) for length in given.curriculum), (share, whole)])


def _some(pieces: Sequence[Example], tokens: int) -> list[Example]:
    """Evenly spaced pieces of about `tokens` tokens in all."""
    total = sum(map(len, pieces))
    step = max(1, round(total / max(tokens, 1)))
    return list(pieces[::step])


def _collate(rows: Sequence[Sequence[Example]], pad_id: int | None) -> Batch:
    """A batch of rows; without segments, for which attention is fastest, where every row is of one document."""
    if all(len(row) == 1 for row in rows):
        return pad([row[0] for row in rows], pad_id, multiple=1)
    return pad_packed(rows, pad_id, multiple=1)


def held_out_figures(
    loss_nats: float,
    counts_V: NDArray[np.int64],
    held: Sequence[Example],
    bytes_: int,
    train: Documents,
    baseline_order: int,
) -> dict[str, float]:
    """The held-out loss per token and in bits per byte, and those of the two counting models.

    counts_V: how often each token is a target of the training text. train: its documents, for n-grams of the order.
    """
    tokens = num_targets(held)
    bits = tokens / math.log(2) / bytes_
    found = {
        "held_out_nats_per_token": loss_nats,
        "held_out_bits_per_byte": loss_nats * bits,
        "unigram_bits_per_byte": unigram_nats(counts_V, held) * bits,
        "held_out_tokens": tokens,
        "held_out_bytes": bytes_,
    }
    if baseline_order:
        pieces = [piece.tokens for piece in held]
        nats_H = kneser_ney_nats(train, pieces, order=baseline_order, vocab_size=len(counts_V))
        ends = np.cumsum([len(piece) for piece in pieces])
        nats = sum(float(nats[1:].sum()) for nats in np.split(nats_H, ends[:-1]))
        found["kneser_ney_bits_per_byte"] = nats / math.log(2) / bytes_
    return found


def shown(measured: Mapping[str, Any]) -> str:
    """The held-out figure beside its baselines, in one line."""
    baselines = {"each token's share of the training text": measured["unigram_bits_per_byte"]}
    if "kneser_ney_bits_per_byte" in measured:
        baselines["Kneser-Ney"] = measured["kneser_ney_bits_per_byte"]
    said = ", ".join(f"{name}: {bits:.3f}" for name, bits in baselines.items())
    bits, bytes_ = measured["held_out_bits_per_byte"], measured["held_out_bytes"]
    return f"held out: {bits:.3f} bits per byte ({said}), {bytes_:,} bytes"


def unigram_nats(counts_V: NDArray[np.int64], held: Sequence[Example]) -> float:
    """Mean -log p of the held-out tokens when p is each token's share of the training tokens, add-one smoothed."""
    nats_V = np.log(counts_V.sum() + len(counts_V)) - np.log(counts_V + 1)
    return float(nats_V[[token for example in held for token in _targets(example)]].mean())


def _targets(example: Example) -> list[int]:
    return [token for token, is_target in zip(example.tokens, example.loss_mask, strict=True) if is_target]

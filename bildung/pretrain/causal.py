"""Causal language modelling from nothing: predict every token from those before it.

The held-out loss is given in bits per byte, which does not depend on the tokenizer, beside those of two models that only
count, on the same tokens: unigrams (how often each token occurs, add-one smoothed) and Kneser-Ney n-grams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.batches import Batch, Example, Shuffled, clm_examples, num_targets, pack, pad, pad_packed
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.evaluate.ngram import KneserNey
from bildung.model.store import LanguageModel, write_model
from bildung.pretrain.birth import Birth, begin, set_aside
from bildung.run.generate import generate
from bildung.train.fit import mean_loss
from bildung.train.objectives import clm
from bildung.train.training import check_ranges, run


@settings_class
class Settings(Birth):
    """Causal language modelling."""

    pack: bool = True  # several documents per row, each seeing only itself; False: one per row, padded
    sample_prompts: tuple[str, ...] = ()  # continued at the end, for people to read
    sample_tokens: int = 40  # length of these continuations
    baseline_order: int = 5  # tokens of the longest n-gram of the Kneser-Ney baseline; 0: none


def causal(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train a causal model on prose (rows with `text`); `out` becomes a model directory.

    Raises SettingsError, DataError, ConfigError (see birth.begin) and TrainingError (see fit).
    """
    source = Path(source)
    check_ranges(settings)

    def work(job: Job) -> None:
        lm = begin(source, settings, kinds=("decoder", "recurrent"))
        texts = documents(settings.data, limit=settings.limit)
        kept, aside = set_aside(list(texts), settings.held_out, settings.seed)
        examples = clm_examples(lm.tokenizer, kept, settings.max_length)
        held = clm_examples(lm.tokenizer, aside, settings.max_length) if aside else []
        rows = pack(examples, settings.max_length) if settings.pack else [[example] for example in examples]
        collate = partial(_collate, pad_id=lm.tokenizer.pad_id, packed=settings.pack)
        held_batches = [pad(held[start : start + 16], lm.tokenizer.pad_id) for start in range(0, len(held), 16)]
        notes = [*([f"{settings.data}: {report}"] if (report := texts.report()) else []), *examples.notes]
        run(
            job,
            lm.model,
            settings,
            Shuffled(rows, settings.batch_size, settings.seed, collate),
            clm,
            what=f"{len(kept)} documents, {num_targets(examples):,} tokens to learn",
            held_out=held_batches,
            notes=notes,
        )
        if aside:
            final = mean_loss(lm.model, clm, held_batches)["loss"]
            job.measured |= held_out_figures(final, examples, held, aside, lm.config.vocab_size)
            if settings.baseline_order:
                counting = KneserNey(
                    [example.tokens for example in examples],
                    order=settings.baseline_order,
                    vocab_size=lm.config.vocab_size,
                )
                bits = sum(_after_first(counting, example) for example in held) / math.log(2)
                job.measured["kneser_ney_bits_per_byte"] = bits / job.measured["held_out_bytes"]
        job.measured |= {"documents": len(kept), "tokens_per_epoch": num_targets(examples)}
        if settings.sample_prompts:
            job.after["samples"] = samples(lm, settings.sample_prompts, settings.sample_tokens, settings.seed)
        lm.model.compute_dtype = None
        write_model(lm, job.out)

    return perform("pretrain causal", source, out, settings, work, data=fingerprint(settings.data), force=force)


def held_out_figures(
    loss_nats: float, train: Sequence[Example], held: Sequence[Example], texts: Sequence[str], vocab_size: int
) -> dict[str, float]:
    """The held-out loss per token and in bits per byte, and the unigram baseline's."""
    bytes_ = sum(len(text.encode()) for text in texts)
    tokens = num_targets(held)
    bits = tokens / math.log(2) / bytes_
    baseline = unigram_nats(train, held, vocab_size)
    return {
        "held_out_nats_per_token": loss_nats,
        "held_out_bits_per_byte": loss_nats * bits,
        "unigram_bits_per_byte": baseline * bits,
        "held_out_tokens": tokens,
        "held_out_bytes": bytes_,
    }


def unigram_nats(train: Sequence[Example], held: Sequence[Example], vocab_size: int) -> float:
    """Mean -log p of the held-out tokens when p is each token's share of the training tokens, add-one smoothed."""
    counts = Counter(token for example in train for token in _targets(example))
    total = sum(counts.values()) + vocab_size
    losses = [-math.log((counts[token] + 1) / total) for example in held for token in _targets(example)]
    return sum(losses) / len(losses)


def _after_first(counting: KneserNey, example: Example) -> float:
    """The sum of -log p over the targets of one piece of a document (its first token is only read)."""
    return float(counting.nats([example.tokens])[1:].sum())


def _targets(example: Example) -> list[int]:
    return [token for token, is_target in zip(example.tokens, example.loss_mask, strict=True) if is_target]


def samples(lm: LanguageModel, prompts: Sequence[str], new_tokens: int, seed: int) -> list[dict[str, str]]:
    """Continuations for people to read, sampled at temperature 0.8."""
    with torch.no_grad():
        texts = [generate(lm, prompt, new_tokens=new_tokens, temperature=0.8, seed=seed) for prompt in prompts]
    return [{"prompt": prompt, "answer": text} for prompt, text in zip(prompts, texts, strict=True)]


def _collate(rows: Sequence[Sequence[Example]], pad_id: int | None, packed: bool) -> Batch:
    return pad_packed(rows, pad_id) if packed else pad([row[0] for row in rows], pad_id)

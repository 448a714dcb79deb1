"""Put an adapter into the weights of its base: one ordinary model directory, no deltas.

    W' = round(W + scaling · B A)          summed in float32, rounded once to 16 bit or more

A quantized base is dequantized first and stays so. Merging into 4-bit weights would round the update away together with
what it was added to (peft #2321: 6 points of AUC; "erased the fine-tune"); `bildung quantize` does it afterwards, and
measures what it costs. How far the merged model is from the adapter is measured on real text and recorded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from bildung.core.errors import AdapterError
from bildung.core.hardware import give_back_memory
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.evaluate import card
from bildung.evaluate.card import CardSettings
from bildung.evaluate.compare import model_difference
from bildung.model.linear import Dense
from bildung.model.store import DTYPES, load, write_model
from bildung.model.transformer import Decoder
from bildung.tune.instruction import base_of

CHARACTERS = 2000  # of each text that the two models are compared on: a few hundred tokens


@settings_class
class Settings:
    """Merging an adapter into its base."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None  # of the result; default: as the base is stored
    compare_on: str = "mini:moby"  # prose on which adapter and merged model are compared
    compare_texts: int = 4  # how many beginnings of documents of it
    card: CardSettings | None = None  # measure these tasks before and after


def merge(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Merge an adapter directory into a model directory. Raises AdapterError when `source` is none."""

    def work(job: Job) -> None:
        lm = load(source)
        if others := set(lm.added) & {"virtual tokens", "attached modules"}:
            raise AdapterError(
                f"{source} holds {', '.join(others)}, which change no matrix: there is nothing to merge."
            )
        if settings.card is not None:
            card.before(job, lm, settings.card)
        dtype = DTYPES[settings.dtype] if settings.dtype else lm.model.weight_dtype
        kinds = sorted({type(linear.base).__name__ for linear in lm.model.linears().values()} - {"Dense"})
        job.measured["merged_matrices"] = fold_deltas(lm.model, dtype)
        write_model(lm, job.out)
        job.notes.append(f"merged in float32, written in {str(dtype).removeprefix('torch.')}")
        if kinds:
            job.notes.append(f"the base was quantized ({', '.join(kinds)}): it was dequantized, the result is dense")
        del lm
        give_back_memory()  # it would stand beside the two that are compared
        merged = load(job.out)
        texts = [text[:CHARACTERS] for text in documents(settings.compare_on, limit=settings.compare_texts)]
        difference = model_difference(load(source), merged, texts, dtype=torch.float32)
        job.measured["adapter_to_merged"] = difference
        job.tokens_seen = int(difference["tokens"])
        if settings.card is not None:
            card.after(job, merged, settings.card)

    check_is_adapter(source)
    base = base_of(Path(source))
    data = fingerprint(settings.compare_on)
    return perform("merge", source, out, settings, work, data=data, companions=base, force=force)


def check_is_adapter(source: Path, what: str = "merge") -> None:
    """Raises AdapterError for anything else."""
    if not base_of(Path(source)):
        raise AdapterError(
            f"{source} is not an adapter directory (no adapter_config.json): there is nothing to {what}."
        )


def fold_deltas(model: Decoder, dtype: torch.dtype) -> int:
    """Make every matrix dense, its enabled deltas in it (computed in float32), and everything of `dtype`; returns how
    many had deltas. Raises AdapterError for a delta on an unembedding that is tied to the embedding."""
    folded = 0
    for name, linear in model.linears().items():
        if name == "lm_head" and model.config.tie_word_embeddings:
            if linear.deltas:
                raise AdapterError(
                    "the adapter changes lm_head, which this model shares with its embedding: merged, it would change "
                    "the embedding too. Use the adapter unmerged, or train one without lm_head."
                )
            continue
        folded += bool(linear.deltas)
        with torch.no_grad():
            weight_OI, bias_O = linear.effective(torch.float32)
        linear.base = Dense(nn.Parameter(weight_OI.to(dtype), requires_grad=False))
        if bias_O is not None:
            linear.bias = nn.Parameter(bias_O, requires_grad=False)
        linear.deltas.clear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model.retrained = ()  # an adapter's own parameters are the model's now
    return folded

"""Quantize the weights of a model directory, and measure what that costs it.

    int8   8 bits per weight, one scale per output channel: hardly ever noticed
    nf4    4.127 bits per weight, blocks of 64 with double quantization (QLoRA): a base to train adapters on

Both round to the nearest value and need no data. Activations stay as they are, so the gain is in bytes, and in speed
where reading the weights is what takes the time, as in decoding.

What it costs is measured on real text against the unquantized model. KL divergence of the next-token distributions sees
any change within a few thousand tokens, where perplexity and accuracy need far more (llama.cpp #4739). Sums are taken
in float32, so that the rounding of activations is not counted in.

The directory loads in transformers: nf4 by bitsandbytes and stays 4-bit in memory; int8 by compressed-tensors, which
makes it dense again while loading: small on disk only. Here, and in vLLM, both stay small. Exceptions:

    GPT-2, GPT-NeoX, ViT, DINOv2   fuse or transpose matrices in their files, or hold a convolution: only this library
                                   reads the quantized form, others stop at it; the record then says so
    T5                             transformers wants down_proj dense in nf4 (`--keep down_proj`), and reads no int8
    encoders with a class head     bitsandbytes' CPU kernel takes no matrix of so few rows: `--keep "classifier.*"`
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch

from bildung.core.errors import ModelFileError, SettingsError
from bildung.core.hardware import Tidy, give_back_memory
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.evaluate import card
from bildung.evaluate.card import CardSettings
from bildung.evaluate.compare import model_difference
from bildung.model.linear import Dense, match_linears
from bildung.model.quantized import METHODS
from bildung.model.quantized_file import only_here
from bildung.model.store import LanguageModel, load, write_model
from bildung.model.transformer import Decoder

CHARACTERS = 2000  # of each text that the two models are compared on: a few hundred tokens


@settings_class
class Settings:
    """Weight quantization."""

    method: Literal["int8", "nf4"]  # how the numbers are stored
    target: str | tuple[str, ...] = "all"  # which matrices: all (but the unembedding), names, or patterns
    keep: tuple[str, ...] = ()  # matrices left as they are, though `target` names them
    compare_on: str = "mini:moby"  # prose on which the model is compared before and after
    compare_texts: int = 8  # how many beginnings of documents of it
    card: CardSettings | None = None  # measure these tasks before and after


def quantize(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Quantize a model directory into `out`.

    Raises ModelFileError for an adapter or a model that is quantized already, NoSuchLinear and SettingsError when
    nothing is left to quantize.
    """

    def work(job: Job) -> None:
        lm = load(source)
        chosen = choose(lm, source, settings)
        if settings.card is not None:
            card.before(job, lm, settings.card)
        job.measured |= {
            "method": settings.method,
            "matrices": len(chosen),
            "kept": [name for name in lm.model.linears() if name not in chosen],
            "bits_per_parameter_before": bits_per_parameter(lm.model, chosen),
            "weight_bytes_before": weight_bytes(lm.model),
            "file_bytes_before": file_bytes(source),
        }
        job.measured["weight_error"] = replace(lm.model, chosen, settings.method)
        if own := only_here(lm.model):
            job.notes.append(
                f"{len(own)} matrices lie in this family's files fused or transposed, which no quantized format is: "
                f"only this library loads the directory, others stop at it."
            )
        write_model(lm, job.out)
        del lm
        give_back_memory()  # two models at a time are enough
        written = load(job.out)  # what is on the disk is what is measured
        job.measured |= {
            "bits_per_parameter_after": bits_per_parameter(written.model, chosen),
            "weight_bytes_after": weight_bytes(written.model),
            "file_bytes_after": file_bytes(job.out),
            **compare(load(source), written, settings),
        }
        job.tokens_seen = job.measured["tokens"]
        if settings.card is not None:
            card.after(job, written, settings.card)

    return perform("quantize", source, out, settings, work, data=fingerprint(settings.compare_on), force=force)


def choose(lm: LanguageModel, source: Path, settings: Settings) -> list[str]:
    """The names of the matrices to quantize."""
    linears = lm.model.linears()
    if lm.added:
        raise ModelFileError(
            f"{source} is an adapter ({', '.join(lm.added)}); `bildung merge` it into its base first. (To keep it "
            f"apart, quantize the base: adapters work over quantized matrices.)"
        )
    if stored := {type(linear.base).__name__ for linear in linears.values()} - {"Dense"}:
        raise ModelFileError(
            f"{source} is quantized already ({', '.join(sorted(stored))}); rounding rounded weights adds both errors. "
            f"Quantize the model that it was made from."
        )
    kept = set(match_linears(lm.model, settings.keep)) if settings.keep else set()
    chosen = [name for name in match_linears(lm.model, settings.target) if name not in kept]
    if not chosen:
        raise SettingsError(f"keep = {settings.keep} leaves nothing of target = {settings.target} to quantize.")
    if "lm_head" in chosen and lm.config.tie_word_embeddings:
        raise SettingsError(
            "this model's unembedding lm_head is its embedding (tie_word_embeddings), which is looked up and stays "
            "dense; take lm_head out of target."
        )
    return chosen


def replace(model: Decoder, names: list[str], method: str) -> float:
    """Quantize the named matrices in place; returns ||W - W'|| / ||W|| over all of them."""
    lost = total = 0.0
    tidy = Tidy()  # what the arithmetic of a matrix leaves behind, the small constants of the next keep from being used
    for name in names:
        linear = model.linears()[name]
        weight_OI = linear.base.dense().detach()
        linear.base = METHODS[method].quantize(weight_OI)
        lost += float((linear.base.dense().float() - weight_OI.float()).pow(2).sum(dtype=torch.float64))
        total += float(weight_OI.float().pow(2).sum(dtype=torch.float64))
        tidy()
    return math.sqrt(lost / total) if total else 0.0


def compare(original: LanguageModel, quantized: LanguageModel, settings: Settings) -> dict[str, Any]:
    """Perplexity before and after, KL(original || quantized) and the share of equal top tokens, on real text; of an
    encoder how far its states moved."""
    texts = [text[:CHARACTERS] for text in documents(settings.compare_on, limit=settings.compare_texts)]
    found: dict[str, Any] = dict(model_difference(original, quantized, texts, dtype=torch.float32))
    renamed = {"perplexity_a": "perplexity_before", "perplexity_b": "perplexity_after"}
    return {renamed.get(name, name): value for name, value in found.items()}


def bits_per_parameter(model: Decoder, names: list[str]) -> float:
    """Bits that the named matrices take per weight, scales and block constants included."""
    bases = [model.linears()[name].base for name in names]
    return 8 * sum(base.stored_bytes for base in bases) / sum(base.in_features * base.out_features for base in bases)


def weight_bytes(model: Decoder) -> int:
    """Bytes of all weights in memory: embeddings, norms and biases too; shared ones once."""
    matrices = sum(
        linear.base.stored_bytes for linear in model.linears().values() if not isinstance(linear.base, Dense)
    )
    return matrices + sum(parameter.nbytes for parameter in model.parameters())


def file_bytes(source: Path) -> int:
    """Bytes of the weight files of a directory (or of a .gguf file)."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)

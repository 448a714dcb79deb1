"""Make a steering vector: the mean activation on some texts minus the mean on others, at one site.

    bildung look steering MODEL OUT --site layers.12.resid_post --positive happy.txt --negative sad.txt
    bildung generate MODEL "I went to the park and" --steer OUT --strength 4

One text a row; positive and negative are any text sources (files, nursery:NAME, mini:NAME). With as many of each they
count as contrast pairs, which changes nothing in the mean and gives the share of pairs that the vector tells apart.
An encoder-decoder reads each text as a source; its decoder's sites are read at the start of the answer.
OUT gets steering.safetensors (model/steering.py says what is done with it).
"""

# R texts, L positions, D the site's last axis

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bildung.core.errors import DataError, NoSuchSite
from bildung.core.operation import Job, perform
from bildung.core.record import Record, hash_directory
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.look.prompt import text_in
from bildung.model.steering import NAME, Steering
from bildung.model.store import LanguageModel, load
from bildung.model.taps import match_sites, observe, sites

Read = Literal["last", "mean"]


@settings_class
class Settings:
    """A steering vector."""

    site: str  # where it is read and will be added: layers.12.resid_post
    positive: str  # texts that have the property
    negative: str  # texts that lack it
    read: Read = "last"  # of each text, the activation at its last token, or the mean over its tokens
    chat: bool = False  # each text is a user's turn, put through the model's chat template
    limit: int | None = None  # so many texts of each kind at most
    max_tokens: int = 512  # refuse longer texts


def steering(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the file. Raises DataError, NoSuchSite."""

    def work(job: Job) -> None:
        lm = load(source)
        kinds = {"positive": settings.positive, "negative": settings.negative}
        texts = {kind: list(documents(data, limit=settings.limit)) for kind, data in kinds.items()}
        read = {kind: vectors(lm, settings.site, some, settings) for kind, some in texts.items()}
        made = Steering(
            site=settings.site,
            vector_D=difference_of_means(read["positive"], read["negative"]),
            weights=hash_directory(Path(source)),
            how=f"difference of means, {settings.read} token of {len(texts['positive'])} and {len(texts['negative'])}",
        )
        made.save(job.out / NAME)
        job.measured = measures(made.vector_D, read["positive"], read["negative"])

    data = {**fingerprint(settings.positive), **fingerprint(settings.negative)}
    return perform("look steering", Path(source), out, settings, work, data=data, force=force)


@torch.no_grad()
def vectors(lm: LanguageModel, site: str, texts: Sequence[str], settings: Settings) -> Tensor:
    """RD float32: one activation per text. Raises NoSuchSite for several sites or one without positions; DataError."""
    found = match_sites(lm.model, site)
    if len(found) != 1 or sites(lm.model)[found[0]].split()[:2] != ["B", "L"]:
        raise NoSuchSite(f"{site!r} names {len(found)} sites; one of shape B L ... is steered, such as a resid_post.")
    rows = []
    for text in texts:
        told, ids = text_in(lm, text, chat=settings.chat, limit=settings.max_tokens)
        with observe(lm.model, site) as seen:
            told.model.hidden(torch.tensor([ids], device=lm.model.device))
        x_LD = seen[found[0]][0].float()
        rows.append((x_LD[-1] if settings.read == "last" else x_LD.mean(0)).cpu())
    return torch.stack(rows)


def difference_of_means(positive_RD: Tensor, negative_RD: Tensor) -> Tensor:
    """mean(positive) - mean(negative), in float64 on the way. Raises DataError where nothing distinguishes them."""
    vector_D = (positive_RD.double().mean(0) - negative_RD.double().mean(0)).float()
    if not bool(vector_D.any()):
        raise DataError("positive and negative texts have the same mean activation; they say the same.")
    return vector_D


def measures(vector_D: Tensor, positive_RD: Tensor, negative_RD: Tensor) -> dict[str, Any]:
    """How long the vector is beside the activations, and how well it tells the texts apart that made it."""
    of_positive_R, of_negative_R = positive_RD @ vector_D.flatten(), negative_RD @ vector_D.flatten()
    higher = (of_positive_R[:, None] > of_negative_R[None]).double().mean()
    measured = {
        "positive": len(positive_RD),
        "negative": len(negative_RD),
        "norm": float(vector_D.norm()),
        "norm of an activation": float(torch.cat((positive_RD, negative_RD)).norm(dim=-1).mean()),
        "told apart (area under the curve, on the same texts)": float(higher),
    }
    if len(positive_RD) == len(negative_RD):
        measured["pairs told apart"] = float((of_positive_R > of_negative_R).double().mean())
    return measured

"""See which tokens of a text mattered for a prediction: gradient x input, integrated gradients, attention rollout.

    bildung look saliency MODEL OUT --prompt "The capital of France is" --target " Paris"
    bildung look saliency CLASSIFIER OUT --prompt "a film without a single idea"        explains the class it chose
    bildung look saliency BERT OUT --prompt "Paris is in [MASK]."                       what it says at the mask
    bildung look saliency T5 OUT --prompt "a source" --answer "what it has said"        the next token of its answer

OUT gets saliency.html (one file, works offline) and saliency.json. The computation is in input_attribution.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import DataError, nearest
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.asked import Asked, answer_number, asked, one_token
from bildung.look.attribution import strip
from bildung.look.contributions.input_attribution import (
    Method,
    Saliency,
    gradient_x_input,
    integrated_gradients,
    outputs,
    rollout,
    token_vector,
)
from bildung.look.pages.page import command_of, look_page
from bildung.look.prompt import answer_name, label, text_in
from bildung.model.store import LanguageModel, load

METHODS: tuple[Method, ...] = ("gradient_x_input", "integrated_gradients", "rollout")
SURE = 0.01  # a gap of this share of what is explained is worth a note


@settings_class
class Settings:
    """Saliency."""

    prompt: str  # the text to read
    chat: bool = False  # the prompt is a user's turn, put through the model's chat template
    answer: str = ""  # what an encoder-decoder has answered the prompt so far
    target: str | None = None  # the class, or the next token, that is explained; default: the likeliest
    methods: tuple[Method, ...] = ()  # default: all that the model allows
    baseline: str = "mean"  # of integrated gradients: mean (of all token vectors), zero, or a token
    points: int = 64  # of the path that integrated gradients follow
    max_tokens: int = 256  # refuse longer prompts


@dataclass
class Explained:
    """One text, one output, several methods."""

    tokens: list[int]
    labels: list[str]
    target: int
    name: str  # of the target
    methods: dict[str, Saliency]


def saliency(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page and the numbers. Raises DataError for what cannot be read or explained."""

    def work(job: Job) -> None:
        given = {
            name: getattr(settings, name) for name in ("chat", "answer", "target", "methods", "baseline", "points")
        }
        lm = load(source, "float32")  # gradients of bfloat16 are rounded at every layer, and integrals of them more
        found = explain(lm, settings.prompt, max_tokens=settings.max_tokens, **given)
        numbers = as_json(found, Path(source).name, settings)
        (job.out / "saliency.json").write_text(json.dumps(numbers, ensure_ascii=False) + "\n", encoding="utf-8")
        (job.out / "saliency.html").write_text(page(numbers, command_of(job)), encoding="utf-8")
        job.tokens_seen = len(found.tokens)
        job.measured = {"target": found.name}
        for method, one in found.methods.items():
            job.measured[f"most salient, {method}"] = found.labels[int(one.scores_L.abs().argmax())]
            if one.gap is not None and one.value is not None and one.baseline is not None:
                job.measured["gap of the integral"] = one.gap
                if not _adds_up(one):
                    job.notes.append(
                        f"the integral misses {one.gap:.3g} of {one.value - one.baseline:.3g}: its shares say little; "
                        f"give more points or another baseline"
                    )

    return perform("look saliency", Path(source), out, settings, work, force=force)


def _adds_up(one: Saliency) -> bool:
    """Whether the shares are those of an integral that has converged; True for methods without one."""
    if one.gap is None or one.value is None or one.baseline is None:
        return True
    return abs(one.gap) <= SURE * abs(one.value - one.baseline)


def explain(
    lm: LanguageModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    chat: bool = False,
    answer: str | Sequence[int] = "",
    target: str | int | None = None,
    methods: Sequence[Method] = (),
    baseline: str = "mean",
    points: int = 64,
    max_tokens: int = 256,
) -> Explained:
    """Saliency of every token. target: a class by name or number, a token by its text or id; None: the likeliest.
    methods: default: all, without the rollout where the model has no attention.

    Raises DataError for a target that is not there, for an unknown method, and as `outputs` and `encode_prompt`.
    """
    told, so_far = text_in(lm, prompt, chat=chat, limit=max_tokens, answer=answer)
    answers = told is not lm
    ids = list(told.model.source) if answers else so_far
    model = asked(lm, so_far if answers else ())
    with torch.no_grad():
        out_C = outputs(model, torch.tensor([ids], device=lm.model.device))[0]
    aim = answer_number(lm, model, target) if target is not None else int(out_C.argmax())
    found: dict[str, Saliency] = {}
    for method in methods or [one for one in METHODS if one != "rollout" or _attends(lm)]:
        if method == "gradient_x_input":
            found[method] = gradient_x_input(model, ids, aim)
        elif method == "integrated_gradients":
            start_D = _baseline(lm, baseline)
            found[method] = integrated_gradients(model, ids, aim, baseline_D=start_D, points=points)
        elif method == "rollout":
            found[method] = Saliency(rollout(model, ids)[_read_at(lm, model, ids)], None)
        else:
            raise DataError(f"{method!r} is no method; {nearest(method, METHODS)} There are {', '.join(METHODS)}.")
    labels = [label(lm.tokenizer, number) for number in (*ids, *(so_far if answers else ()))]
    return Explained(ids + (so_far if answers else []), labels, aim, answer_name(lm, model, aim), found)


def _attends(lm: LanguageModel) -> bool:
    return any(site.endswith("attn.probs") for site in lm.model.sites)


def _read_at(lm: LanguageModel, model: Asked, ids: Sequence[int]) -> int:
    """The place whose state is turned into the answer: the first token, [CLS], the mask, or the last."""
    if lm.config.kind != "encoder":
        return -1
    return 0 if model.has_classes or model.mask_id is None else list(ids).index(model.mask_id)


def _baseline(lm: LanguageModel, baseline: str) -> Tensor | None:
    if baseline == "mean":
        return None
    if baseline == "zero":
        return torch.zeros_like(token_vector(lm, 0))
    special = lm.tokenizer.backend.token_to_id(baseline)
    return token_vector(lm, one_token(lm, baseline) if special is None else special)


def as_json(found: Explained, model: str, settings: Settings) -> dict[str, Any]:
    """What the page shows."""
    return {
        "model": model,
        "prompt": settings.prompt,
        "chat": settings.chat,
        "target": found.name,
        "baseline": settings.baseline,
        "labels": found.labels,
        "tokens": found.tokens,
        "methods": {
            name: {
                "scores": [float(f"{value:.5g}") for value in one.scores_L.tolist()],
                "value": one.value,
                "baseline": one.baseline,
                "gap": one.gap,
                "sure": _adds_up(one),
            }
            for name, one in found.methods.items()
        },
    }


def page(numbers: dict[str, Any], command: str) -> str:
    """saliency.html: the text once per method, coloured, and all numbers as a map and a table."""
    strips = [
        {"name": name, **one, "cells": strip(numbers["labels"], one["scores"], name)}
        for name, one in numbers["methods"].items()
    ]
    grid = {
        "title": "All methods",
        "note": "tokens across",
        "corner": "",
        "columns": numbers["labels"],
        "rows": [name.replace("_", " ") for name in numbers["methods"]],
        "cells": [[one | {"text": one["number"]} for one in row["cells"]] for row in strips],
    }
    keys = ("model", "prompt", "chat", "target", "baseline")
    return look_page("saliency.html", strips=strips, grid=grid, command=command, **{key: numbers[key] for key in keys})

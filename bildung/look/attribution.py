"""See which heads, layers and neurons wrote a prediction: direct logit attribution, of a logit or of a difference.

    bildung look attribution MODEL OUT --prompt "The capital of France is" --target " Paris" --against " London"
    bildung look attribution T5 OUT --prompt "a source" --answer "what it has answered so far"

OUT gets attribution.html (one file, works offline), attribution.json and shares.safetensors. The shares add up to the
logit; what they mean, and do not mean, is in decompose.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bildung.core.errors import DataError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.asked import Asked, answer_number
from bildung.look.contributions.decompose import decompose
from bildung.look.pages.page import command_of, look_page
from bildung.look.prompt import answer_name, label, text_in
from bildung.model.store import LanguageModel, load

LONGEST = 512  # tokens
MOST = 24  # rows of the lists on the page


@settings_class
class Settings:
    """Direct logit attribution."""

    prompt: str  # the text to read
    chat: bool = False  # the prompt is a user's turn, put through the model's chat template
    answer: str = ""  # what an encoder-decoder has answered the prompt so far
    target: str | None = None  # the next token (or class) whose logit is explained; default: the likeliest
    against: str | None = None  # explain the target's logit minus this token's
    position: int = -1  # of the prompt's (the answer's) tokens, after which is predicted; negative from the end
    max_tokens: int = LONGEST  # refuse longer prompts


@dataclass
class Attribution:
    """One explained number. All shares are of `logit`."""

    tokens: list[int]
    labels: list[str]  # of the tokens, for people
    position: int
    target: tuple[int, str]
    against: tuple[int, str] | None
    logit: float  # or the difference; before a soft-cap
    shares: dict[str, float]  # of every writer, in forward order: they add up to `logit`
    heads_NH: Tensor
    neurons_NF: Tensor | None
    sources_NHS: Tensor | None  # a head's share by the position it read
    cross_NH: Tensor | None = None  # of heads that look at a source
    cross_sources_NHS: Tensor | None = None  # by the source's positions
    source_labels: tuple[str, ...] = ()


def attribution(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page and the numbers. Raises DataError for what cannot be read or is no decoder."""

    def work(job: Job) -> None:
        lm, model = load(source, "float32"), Path(source).name  # in bfloat16 the shares miss the logit by 1e-2
        found = attribute(
            lm,
            settings.prompt,
            chat=settings.chat,
            answer=settings.answer,
            target=settings.target,
            against=settings.against,
            position=settings.position,
            max_tokens=settings.max_tokens,
        )
        tensors = {"heads": found.heads_NH, "neurons": found.neurons_NF, "sources": found.sources_NHS}
        tensors |= {"cross_heads": found.cross_NH, "cross_sources": found.cross_sources_NHS}
        kept = {name: one.float().contiguous() for name, one in tensors.items() if one is not None}
        save_file(kept, job.out / "shares.safetensors")
        numbers = as_json(found, model, settings.prompt, settings.chat)
        (job.out / "attribution.json").write_text(json.dumps(numbers, ensure_ascii=False) + "\n", encoding="utf-8")
        (job.out / "attribution.html").write_text(page(numbers, command_of(job)), encoding="utf-8")
        job.tokens_seen = len(found.tokens)
        job.measured = {"logit": found.logit, "target": found.target[1], "largest": numbers["largest"][0]["name"]}

    return perform("look attribution", source, out, settings, work, force=force)


def attribute(
    lm: LanguageModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    chat: bool = False,
    answer: str | Sequence[int] = "",
    target: str | int | None = None,
    against: str | int | None = None,
    position: int = -1,
    max_tokens: int = LONGEST,
) -> Attribution:
    """Shares of the logit of the token that follows `position`, or of a difference of two logits; of a classifier over
    a decoder, of a class.

    target, against: a text of exactly one token, or a token id (a class's name or number); target None is the
    likeliest. Raises DataError for a text of several tokens and as `decompose` and `encode_prompt`.
    """
    told, ids = text_in(lm, prompt, chat=chat, limit=max_tokens, answer=answer)
    tokens_1L = torch.tensor([ids], device=lm.model.device)
    decompose(told.model, tokens_1L, [0], position)  # refuses what cannot be attributed
    question = Asked(told.model)
    if question.has_classes and position not in (-1, len(ids) - 1):
        raise DataError(f"position {position}: this model's classes are read off its last token.")
    with torch.no_grad():
        logits = told.model(tokens_1L)[0] if question.has_classes else told.model(tokens_1L)[0, position]
    aim = answer_number(told, question, target) if target is not None else int(logits.argmax())
    other = answer_number(told, question, against) if against is not None else None
    found = decompose(told.model, tokens_1L, [aim] if other is None else [aim, other], position)
    sign_T = torch.tensor([1.0, -1.0][: 1 if other is None else 2], dtype=torch.float64, device=tokens_1L.device)
    pick = lambda x: None if x is None else (x @ sign_T).cpu()  # noqa: E731
    name = partial(answer_name, lm, question)
    heads_NH = pick(found.heads_NHT())
    assert heads_NH is not None
    crosses = found.cross_sources_NHST is not None
    return Attribution(
        tokens=ids,
        labels=[label(lm.tokenizer, number) for number in ids],
        position=position % len(ids),
        target=(aim, name(aim)),
        against=None if other is None else (other, name(other)),
        logit=float(found.logits_T @ sign_T),
        shares={writer: float(share @ sign_T) for writer, share in found.shares.items()},
        heads_NH=heads_NH,
        neurons_NF=pick(found.neurons_NFT),
        sources_NHS=pick(found.sources_NHST),
        cross_NH=pick(found.heads_NHT("cross")) if crosses else None,
        cross_sources_NHS=pick(found.cross_sources_NHST),
        source_labels=tuple(label(lm.tokenizer, number) for number in getattr(told.model, "source", ())),
    )


def as_json(found: Attribution, model: str, prompt: str, chat: bool) -> dict[str, Any]:
    """What the page shows, and all shares."""
    shares = [{"name": name, "share": _short(share)} for name, share in found.shares.items()]
    largest = sorted(found.shares, key=lambda name: -abs(found.shares[name]))[:MOST]
    return {
        "model": model,
        "prompt": prompt,
        "chat": chat,
        "tokens": found.tokens,
        "labels": found.labels,
        "position": found.position,
        "target": found.target[1],
        "against": None if found.against is None else found.against[1],
        "logit": _short(found.logit),
        "shares": shares,
        "largest": [{"name": name, "share": _short(found.shares[name])} for name in largest],
        "heads": [[_short(value) for value in row] for row in found.heads_NH.tolist()],
        "cross": []
        if found.cross_NH is None
        else [[_short(value) for value in row] for row in found.cross_NH.tolist()],
        "source_labels": list(found.source_labels),
        "mlps": [_short(found.shares.get(f"layers.{n}.mlp", 0.0)) for n in range(len(found.heads_NH))],
        "neurons": _neurons(found),
        "sources": _sources(found.heads_NH, found.sources_NHS),
        "cross_sources": [] if found.cross_NH is None else _sources(found.cross_NH, found.cross_sources_NHS),
    }


def _rounded(values_NH: Tensor) -> list[list[float]]:
    return [[_short(value) for value in row] for row in values_NH.tolist()]


def _neurons(found: Attribution) -> list[dict[str, Any]]:
    if found.neurons_NF is None:
        return []
    _, places = found.neurons_NF.abs().flatten().topk(min(MOST, found.neurons_NF.numel()))
    pairs = [divmod(int(place), found.neurons_NF.shape[1]) for place in places]
    return [{"layer": n, "neuron": f, "share": _short(float(found.neurons_NF[n, f]))} for n, f in pairs]


def _sources(heads_NH: Tensor, sources_NHS: Tensor | None) -> list[dict[str, Any]]:
    """The heads with the largest shares, and what each token they read gave."""
    if sources_NHS is None:
        return []
    _, places = heads_NH.abs().flatten().topk(min(MOST // 2, heads_NH.numel()))
    pairs = [divmod(int(place), heads_NH.shape[1]) for place in places]
    return [
        {
            "layer": n,
            "head": h,
            "share": _short(float(heads_NH[n, h])),
            "by_token": [_short(value) for value in sources_NHS[n, h].tolist()],
        }
        for n, h in pairs
    ]


def page(numbers: dict[str, Any], command: str) -> str:
    """attribution.html: heads and layers as a heat map, the largest shares, and where heads read."""
    kinds = {"head": numbers["heads"]} | ({"cross": numbers["cross"]} if numbers["cross"] else {})
    kinds |= {"mlp": [[value] for value in numbers["mlps"]]}
    highest = max(abs(value) for rows in kinds.values() for row in rows for value in row) or 1.0
    named = {
        kind: [f"{kind} {h}" if kind != "mlp" else kind for h in range(len(rows[0]))] for kind, rows in kinds.items()
    }
    grid = {
        "title": "Heads and feed-forward layers",
        "note": "what each adds to the logit" + ("; cross: heads that look at the source" if numbers["cross"] else ""),
        "corner": "layer",
        "columns": [name for names in named.values() for name in names],
        "rows": list(range(len(numbers["heads"]))),
        "cells": [
            [
                cell(value, highest, f"layer {n} {name}")
                for kind, rows in kinds.items()
                for name, value in zip(named[kind], rows[n], strict=True)
            ]
            for n in range(len(numbers["heads"]))
        ],
    }
    read = [
        ("Where the strongest heads read", "head", numbers["labels"], numbers["sources"]),
        ("Where the strongest heads read the source", "cross", numbers["source_labels"], numbers["cross_sources"]),
    ]
    strips = [
        {
            "title": title,
            "labels": labels[: len(heads[0]["by_token"])],
            "heads": [
                one | {"name": name, "cells": strip(labels, one["by_token"], name)}
                for one in heads
                for name in [f"layer {one['layer']} {kind} {one['head']}"]
            ],
        }
        for title, kind, labels, heads in read
        if heads
    ]
    keys = ("model", "prompt", "chat", "target", "against", "logit", "largest", "neurons", "labels", "position")
    shown = {key: numbers[key] for key in keys}
    return look_page("attribution.html", grid=grid, highest=highest, strips=strips, command=command, **shown)


def cell(value: float, highest: float, title: str) -> dict[str, Any]:
    """A number as a coloured cell: the sign is a colour, and is written too."""
    return {
        "text": f"{value:+.2f}",
        "v": round(min(abs(value) / highest, 1.0), 3),
        "style": ("minus" if value < 0 else "plus") + (" strong" if abs(value) > 0.66 * highest else ""),
        "title": f"{title}: {value:+.4g}",
    }


def strip(labels: Sequence[str], values: Sequence[float], title: str) -> list[dict[str, Any]]:
    """Tokens coloured by a number each."""
    highest = max(map(abs, values), default=0.0) or 1.0
    made = []
    for text, value in zip(labels, values, strict=False):
        one = cell(value, highest, f"{title}, {text}")
        made.append(one | {"number": one["text"], "text": text})
    return made


def _short(value: float) -> float:
    return float(f"{value:.5g}")

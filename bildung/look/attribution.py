"""See which heads, layers and neurons wrote a prediction: direct logit attribution, of a logit or of a difference.

    bildung look attribution MODEL OUT --prompt "The capital of France is" --target " Paris" --against " London"

OUT gets attribution.html (one file, works offline), attribution.json and shares.safetensors. The shares add up to the
logit; what they mean, and do not mean, is in look/decompose.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bildung.core.errors import DataError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.decompose import decompose
from bildung.look.page import command_of, look_page
from bildung.look.prompt import encode_prompt, label
from bildung.model.store import LanguageModel, load

LONGEST = 512  # tokens
MOST = 24  # rows of the lists on the page


@settings_class
class Settings:
    """Direct logit attribution."""

    prompt: str  # the text to read
    chat: bool = False  # the prompt is a user's turn, put through the model's chat template
    target: str | None = None  # the next token whose logit is explained (its space too); default: the likeliest
    against: str | None = None  # explain the target's logit minus this token's
    position: int = -1  # of the prompt's tokens, after which is predicted; negative from the end
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


def attribution(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page and the numbers. Raises DataError for what cannot be read or is no decoder."""

    def work(job: Job) -> None:
        lm, model = load(source), Path(source).name
        found = attribute(
            lm,
            settings.prompt,
            chat=settings.chat,
            target=settings.target,
            against=settings.against,
            position=settings.position,
            max_tokens=settings.max_tokens,
        )
        tensors = {"heads": found.heads_NH, "neurons": found.neurons_NF, "sources": found.sources_NHS}
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
    target: str | int | None = None,
    against: str | int | None = None,
    position: int = -1,
    max_tokens: int = LONGEST,
) -> Attribution:
    """Shares of the logit of the token that follows `position`, or of a difference of two logits.

    target, against: a text of exactly one token, or a token id; target None is the likeliest token.
    Raises DataError for a text of several tokens and as `decompose` and `encode_prompt`.
    """
    ids = encode_prompt(lm, prompt, chat, max_tokens)
    tokens_1L = torch.tensor([ids], device=lm.model.device)
    aim = one_token(lm, target) if target is not None else -1
    if aim < 0:
        decompose(lm.model, tokens_1L, [0], position)  # refuses what cannot be attributed
        with torch.no_grad():
            aim = int(lm.model(tokens_1L)[0, position].argmax())
    other = one_token(lm, against) if against is not None else None
    found = decompose(lm.model, tokens_1L, [aim] if other is None else [aim, other], position)
    sign_T = torch.tensor([1.0, -1.0][: 1 if other is None else 2], dtype=torch.float64, device=tokens_1L.device)
    pick = lambda x: None if x is None else (x @ sign_T).cpu()  # noqa: E731
    heads_NH = pick(found.heads_NHT())
    assert heads_NH is not None
    return Attribution(
        tokens=ids,
        labels=[label(lm.tokenizer, number) for number in ids],
        position=position % len(ids),
        target=(aim, label(lm.tokenizer, aim)),
        against=None if other is None else (other, label(lm.tokenizer, other)),
        logit=float(found.logits_T @ sign_T),
        shares={name: float(share @ sign_T) for name, share in found.shares.items()},
        heads_NH=heads_NH,
        neurons_NF=pick(found.neurons_NFT),
        sources_NHS=pick(found.sources_NHST),
    )


def one_token(lm: LanguageModel, text: str | int) -> int:
    """The id of a text that is one token. Raises DataError."""
    if isinstance(text, int):
        return text
    ids = lm.tokenizer.encode(text, bos=False)
    if len(ids) != 1:
        parts = ", ".join(repr(label(lm.tokenizer, number)) for number in ids)
        raise DataError(f"{text!r} is {len(ids)} tokens ({parts}); a logit belongs to one. A space may be part of it.")
    return ids[0]


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
        "mlps": [_short(found.shares.get(f"layers.{n}.mlp", 0.0)) for n in range(len(found.heads_NH))],
        "neurons": _neurons(found),
        "sources": _sources(found),
    }


def _neurons(found: Attribution) -> list[dict[str, Any]]:
    if found.neurons_NF is None:
        return []
    _, places = found.neurons_NF.abs().flatten().topk(min(MOST, found.neurons_NF.numel()))
    pairs = [divmod(int(place), found.neurons_NF.shape[1]) for place in places]
    return [{"layer": n, "neuron": f, "share": _short(float(found.neurons_NF[n, f]))} for n, f in pairs]


def _sources(found: Attribution) -> list[dict[str, Any]]:
    """The heads with the largest shares, and what each token they read gave."""
    if found.sources_NHS is None:
        return []
    _, places = found.heads_NH.abs().flatten().topk(min(MOST // 2, found.heads_NH.numel()))
    pairs = [divmod(int(place), found.heads_NH.shape[1]) for place in places]
    return [
        {
            "layer": n,
            "head": h,
            "share": _short(float(found.heads_NH[n, h])),
            "by_token": [_short(value) for value in found.sources_NHS[n, h].tolist()],
        }
        for n, h in pairs
    ]


def page(numbers: dict[str, Any], command: str) -> str:
    """attribution.html: heads and layers as a heat map, the largest shares, and where heads read."""
    highest = max(abs(value) for row in [*numbers["heads"], numbers["mlps"]] for value in row) or 1.0
    rows = [
        [cell(value, highest, f"layer {n} head {h}") for h, value in enumerate(row)]
        + [cell(numbers["mlps"][n], highest, f"layer {n} mlp")]
        for n, row in enumerate(numbers["heads"])
    ]
    strips = [
        one | {"cells": strip(numbers["labels"], one["by_token"], f"layer {one['layer']} head {one['head']}")}
        for one in numbers["sources"]
    ]
    keys = ("model", "prompt", "chat", "target", "against", "logit", "largest", "neurons", "labels", "position")
    grid = {
        "title": "Heads and feed-forward layers",
        "note": "what each adds to the logit",
        "corner": "layer",
        "columns": [*(f"head {h}" for h in range(len(numbers["heads"][0]))), "mlp"],
        "rows": list(range(len(rows))),
        "cells": rows,
    }
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

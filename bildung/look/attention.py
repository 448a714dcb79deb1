"""See where every attention head looks on a prompt: one model's patterns, or how a second model's differ.

    bildung look attention SOURCE OUT --prompt "When Mary and John went to the store, John gave a drink to"
    bildung look attention TUNED OUT --prompt "..." --against BASE
    bildung look attention T5 OUT --prompt "a source" --stack decoder     its own answer

OUT gets attention.html (one file, works offline), attention.png, patterns.safetensors and attention.json. The
computation is in attention_patterns.py.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.asked import StackName
from bildung.look.attention_heads.attention_patterns import (
    AttentionPatterns,
    attention_patterns,
    moved,
    pattern_difference,
    pooled,
)
from bildung.look.pages import picture
from bildung.look.pages.page import command_of, data_url, look_page, packed
from bildung.look.precise import load_precise

THUMB = 32  # points across a head's small picture on the page
PICTURE = 64  # and on the PNG


@settings_class
class Settings:
    """Attention patterns."""

    prompt: str  # the text to read
    chat: bool = False  # the prompt is a user's turn, put through the model's chat template
    stack: StackName = "encoder"  # of an encoder-decoder: its encoder reads the prompt, its decoder its own answer
    against: Path | None = None  # a second model (B) that reads the same tokens
    max_tokens: int = 512  # refuse longer prompts: patterns grow with the square


def attention(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page, the picture and the patterns. Raises DataError or TokenizerError for what cannot be read."""
    companions = {"against": settings.against} if settings.against is not None else {}

    def work(job: Job) -> None:
        lm, prompt, chat, longest = load_precise(source), settings.prompt, settings.chat, settings.max_tokens
        model, other, b = Path(source).name, None, None
        if settings.against is None:
            a = attention_patterns(lm, prompt, chat=chat, max_tokens=longest, stack=settings.stack)
        else:
            other = settings.against.name
            other_lm = load_precise(settings.against)
            a, b = pattern_difference(lm, other_lm, prompt, chat=chat, max_tokens=longest, stack=settings.stack)
        tensors = {"a": a.probs_NHLS} | ({"b": b.probs_NHLS} if b else {})
        save_file({key: probs.contiguous() for key, probs in tensors.items()}, job.out / "patterns.safetensors")
        numbers = as_json(a, b, prompt, chat, model, other)
        (job.out / "attention.json").write_text(json.dumps(numbers, ensure_ascii=False) + "\n", encoding="utf-8")
        if b is None:
            shown = pooled(a.probs_NHLS, PICTURE).numpy()
            picture.draw_heads(shown, f"{model}: attention of every head", job.out / "attention.png")
        else:
            title = f"attention of every head: {other} minus {model} (blue: {other} looks there more)"
            difference = pooled(b.probs_NHLS - a.probs_NHLS, PICTURE).numpy()
            picture.draw_heads(difference, title, job.out / "attention.png", difference=True)
        made = page(numbers, a, b, job.out / "attention.png", command_of(job))
        (job.out / "attention.html").write_text(made, encoding="utf-8")
        job.tokens_seen = len(a.tokens)
        job.measured = summary(numbers)

    return perform("look attention", source, out, settings, work, companions=companions, force=force)


def as_json(
    a: AttentionPatterns, b: AttentionPatterns | None, prompt: str, chat: bool, model: str, against: str | None
) -> dict[str, Any]:
    """What the page shows besides the patterns; scores are {name: [layer][head]}."""
    scores = a.scores() | ({"moved": moved(a, b)} if b else {})
    layers, heads = a.probs_NHLS.shape[:2]
    return {
        "model": model,
        "against": against,
        "prompt": prompt,
        "chat": chat,
        "tokens": a.tokens,
        "labels": a.labels,
        "layers": layers,
        "heads": heads,
        "scores": {name: [[round(value, 4) for value in row] for row in t.tolist()] for name, t in scores.items()},
    }


def summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that go into the record: the head with the highest score of each kind."""
    measured: dict[str, Any] = {"positions": len(numbers["tokens"])}
    for name, rows in numbers["scores"].items():
        value, layer, head = max((value, n, h) for n, row in enumerate(rows) for h, value in enumerate(row))
        measured[f"highest {name}"] = f"layer {layer} head {head}: {value:.3g}"
    return measured


def page(numbers: dict[str, Any], a: AttentionPatterns, b: AttentionPatterns | None, png: Path, command: str) -> str:
    """attention.html. Probabilities travel as bytes, steps of 1/255, one packed block per head that the page unpacks
    when that head is chosen; the sheet of all heads has small pictures of its own."""
    sides = {"a": a.probs_NHLS} | ({"b": b.probs_NHLS} if b else {})
    thumbs = {key: packed(as_steps(pooled(probs, THUMB))) for key, probs in sides.items()}
    widest = 1.0
    if b is not None:
        difference = pooled(b.probs_NHLS - a.probs_NHLS, THUMB)  # the widest one outlives pooling
        widest = float(difference.abs().max())
        steps = (difference / max(widest, 1e-6) * 127).round().to(torch.int8)
        thumbs["difference"] = packed(steps.contiguous().numpy().tobytes())
    blobs = {
        f"{key}-{number}": packed(as_steps(pattern_LS))
        for key, probs in sides.items()
        for number, pattern_LS in enumerate(probs.flatten(0, 1))
    }
    more = {
        "thumbs": thumbs,
        "thumb": min(THUMB, len(a.tokens)),
        "widest": widest,
        "causal": not any(bool(one.triu(1).any()) for one in a.probs_NHLS),
    }
    return look_page(
        "attention.html",
        script="attention.js",
        facts=summary(numbers).items(),
        picture=data_url(png),
        data=numbers | more,
        blobs=blobs,
        command=command,
        **{key: numbers[key] for key in ("model", "against", "prompt", "chat")},
    )


def as_steps(probs: Tensor) -> bytes:
    """Numbers from 0 to 1, one byte each."""
    return (probs * 255).round().clamp(0, 255).byte().contiguous().numpy().tobytes()


def as_bytes(probs_NHLS: Tensor) -> str:
    """The same as text for a page."""
    return base64.b64encode(as_steps(probs_NHLS)).decode()

"""An atlas of a model's attention heads: which of them do induction, look back, copy; sortable, on one page.

    bildung look heads MODEL OUT
    bildung look heads MODEL OUT --data nursery:sotu            with the in-context-learning score on real text

Heads are tried on random tokens that come twice (head_scores.py says what each score is), and their weights are
asked what they copy (head_weights.py). OUT gets heads.html (one file, works offline), heads.json and
heads.safetensors. From Python: `head_atlas(bildung.load(MODEL)).scores["induction"]`, layers x heads.
"""

# N layers, H heads, L positions

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bildung.core.errors import DataError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.look import by_position
from bildung.look.asked import StackName
from bildung.look.attention import as_bytes
from bildung.look.attention_heads.attention_patterns import AttentionPatterns, attention_patterns
from bildung.look.attention_heads.head_scores import HeadScores, head_scores, repeated_tokens
from bildung.look.attention_heads.head_weights import copying, embedding, head_weights, through, unembedding
from bildung.look.attention_heads.in_context_score import InContext, in_context_score
from bildung.look.pages.page import command_of, look_page
from bildung.look.precise import load_precise
from bildung.look.prompt import half
from bildung.model.base import CausalLM
from bildung.model.store import LanguageModel

SHOWN = 16  # tokens of the stretch whose patterns the page shows
# What the page says of each score.
MEANING = {
    "induction": "attention to what followed the same token earlier",
    "previous token": "attention to the token before",
    "duplicate token": "attention to the same token earlier",
    "first token": "attention to the first token, where a head rests",
    "copying": "share of what it adds to the logits that goes to the token attended to, above chance",
    "OV copying": "Σλ/Σ|λ| of the full OV circuit, from weights alone: 1 copies, −1 suppresses",
}


@settings_class
class Settings:
    """An atlas of heads."""

    stretch: int = 50  # distinct random tokens, which then come again
    copies: int = 2  # how often they stand there
    rows: int = 8  # such rows
    seed: int = 0  # of the tokens
    data: str | None = None  # text for the in-context-learning score
    length: int | None = None  # tokens of each piece of it; default: 512, or the model's context if that is shorter
    text_rows: int = 64  # pieces of it
    stack: StackName = "decoder"  # of an encoder-decoder; its decoder answers a source without words


@dataclass(frozen=True)
class Atlas:
    """scores: name -> layers x heads. in_context: on real text, if any was given."""

    scores: dict[str, Tensor]
    seen: HeadScores
    patterns: AttentionPatterns | None
    in_context: InContext | None


def heads(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page and the numbers. Raises DataError for a model without heads that read text, or too small a
    vocabulary or context."""

    def work(job: Job) -> None:
        lm = load_precise(source)
        atlas = head_atlas(lm, settings)
        numbers = as_json(atlas, half(lm, settings.stack), Path(source).name)
        (job.out / "heads.json").write_text(json.dumps(numbers, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file({name: scores.contiguous() for name, scores in atlas.scores.items()}, job.out / "heads.safetensors")
        (job.out / "heads.html").write_text(page(numbers, atlas, command_of(job)), encoding="utf-8")
        job.measured = summary(numbers)
        job.tokens_seen = atlas.seen.repeats.tokens_RL.numel()

    data = fingerprint(settings.data) if settings.data is not None else None
    return perform("look heads", source, out, settings, work, data=data, force=force)


def head_atlas(lm: LanguageModel, settings: Settings | None = None) -> Atlas:
    """Every score of every head. Raises DataError, as `heads`."""
    given = settings or Settings()
    lm = half(lm, given.stack)
    layers = head_weights(lm.model)
    repeats = repeated_tokens(lm, stretch=given.stretch, copies=given.copies, rows=given.rows, seed=given.seed)
    seen = head_scores(lm, repeats, layers)
    scores = dict(seen.scores)
    patterns = None
    if isinstance(lm.model, CausalLM):
        through_DD = through(embedding(lm.model), unembedding(lm.model))
        scores["OV copying"] = torch.stack([copying(layer, through_DD) for layer in layers])
        short = repeated_tokens(lm, stretch=min(SHOWN, given.stretch), copies=2, rows=1, seed=given.seed)
        patterns = attention_patterns(lm, short.tokens_RL[0])
    order = [name for name in MEANING if name in scores]
    text = None if given.data is None else in_context_score(lm, pieces(lm, given))
    return Atlas({name: scores[name] for name in order}, seen, patterns, text)


def pieces(lm: LanguageModel, given: Settings) -> Tensor:
    """Rows of text for the in-context-learning score. Raises DataError where no text is long enough."""
    if given.data is None:
        raise DataError("no text was given; set `data`.")
    length = given.length or min(512, lm.config.max_position_embeddings)
    return by_position.pieces(lm, by_position.Settings(data=given.data, length=length, rows=given.text_rows))


def as_json(atlas: Atlas, lm: LanguageModel, model: str) -> dict[str, Any]:
    """What the page shows besides the patterns; scores are {name: [layer][head]}."""
    layers, count = next(iter(atlas.scores.values())).shape
    group = lm.config.num_attention_heads // lm.config.num_key_value_heads
    seen = atlas.seen
    return {
        "model": model,
        "layers": layers,
        "heads": count,
        "key_value_heads": [head // group for head in range(count)],
        "stretch": seen.repeats.stretch,
        "copies": seen.repeats.copies,
        "rows": len(seen.repeats.tokens_RL),
        "labels": atlas.patterns.labels if atlas.patterns else [],
        "meaning": {name: MEANING[name] for name in atlas.scores},
        "scores": {name: [[round(v, 4) for v in row] for row in t.tolist()] for name, t in atlas.scores.items()},
        "repeated": None
        if not len(seen.loss_L)
        else {
            "first": seen.stretch_loss(0),
            "again": seen.stretch_loss(seen.repeats.copies - 1),
            "difference": seen.in_context,
        },
        "in_context": asdict(atlas.in_context) if atlas.in_context else None,
    }


def summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that go into the record: the strongest head of each kind, and what context is worth."""
    measured: dict[str, Any] = {}
    for name, rows in numbers["scores"].items():
        value, layer, head = max((value, n, h) for n, row in enumerate(rows) for h, value in enumerate(row))
        measured[f"highest {name}"] = f"layer {layer} head {head}: {value:.3f}"
    if (repeated := numbers["repeated"]) is not None:
        measured["loss of random tokens"] = f"{repeated['first']:.2f} at first, {repeated['again']:.2f} again"
    if (score := numbers["in_context"]) is not None:
        measured["in-context-learning score"] = (
            f"{score['score']:.3f} ± {score['stderr']:.3f} nats (token {score['late']} minus {score['early']})"
        )
    return measured


def page(numbers: dict[str, Any], atlas: Atlas, command: str) -> str:
    """heads.html. Patterns travel as bytes, steps of 1/255."""
    patterns = as_bytes(atlas.patterns.probs_NHLS) if atlas.patterns else None
    return look_page(
        "heads.html",
        script="heads.js",
        command=command,
        facts=summary(numbers).items(),
        data=numbers | {"patterns": patterns},
        **{key: numbers[key] for key in ("model", "layers", "heads", "stretch", "copies", "rows", "scores", "meaning")},
    )

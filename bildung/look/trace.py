"""Where a model keeps what it knows of a subject: causal tracing with noise on the subject's embeddings.

    bildung look trace MODEL OUT --prompt "The capital of France is" --subject France
    bildung look trace MODEL OUT --prompt "..." --subject ... --answer " Paris" --samples 10 --window 10

OUT gets trace.html (one file, works offline), trace.png and trace.json. What is computed is in causal_trace.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bildung.core.errors import DataError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.asked import Asked, answer_number, asked
from bildung.look.causal.causal_trace import WINDOWED, Trace, causal_trace, span_of
from bildung.look.pages.grid_page import write_grids
from bildung.look.pages.page import command_of
from bildung.look.prompt import answer_name, label
from bildung.model.store import LanguageModel, load


@settings_class
class Settings:
    """Causal tracing."""

    prompt: str  # the text up to the answer
    subject: str  # the part of it whose embeddings become noisy
    answer: str | None = None  # one token; none: what the model says
    sites: tuple[str, ...] = ("resid_post", "mlp.out", "attn.out")  # what is put back
    deviations: float = 3.0  # the noise, in standard deviations of the embeddings
    samples: int = 10  # of the noise
    window: int = 10  # layers of mlp.out and attn.out that are put back together
    seed: int = 0
    max_tokens: int = 96


def trace(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page, the picture and the numbers. Raises DataError for a subject or answer that does not fit."""

    def work(job: Job) -> None:
        lm = load(source, "float32")
        lm.model.eval()
        tokens, subject = span_of(lm, settings.prompt, settings.subject)
        if len(tokens) > settings.max_tokens:
            raise DataError(f"the prompt has {len(tokens)} tokens; at most {settings.max_tokens} are traced.")
        model = asked(lm)
        answer = None if settings.answer is None else answer_number(lm, model, settings.answer)
        seen = causal_trace(
            model,
            tokens,
            subject,
            answer,
            places=settings.sites,
            deviations=settings.deviations,
            samples=settings.samples,
            window=settings.window,
            seed=settings.seed,
        )
        numbers = as_json(lm, model, seen, Path(source).name, settings) | {"command": command_of(job)}
        (job.out / "trace.json").write_text(json.dumps(numbers, ensure_ascii=False) + "\n", encoding="utf-8")
        write_grids(numbers, job.out / "trace.html", job.out / "trace.png")
        job.measured = {key: numbers[key] for key in ("clean", "corrupted", "sigma")} | {"answer": numbers["answer"]}
        for site, grid in seen.restored.items():
            layer, position = divmod(int(grid.argmax()), grid.shape[1])
            tokens_there = model.answer if site.startswith("decoder.") else seen.tokens
            place = f"layer {layer}, token {position} {label(lm.tokenizer, tokens_there[position])!r}"
            job.measured[f"strongest {site}"] = f"{place}: {grid.max().item():.3g}"
        job.tokens_seen = len(tokens)

    return perform("look trace", source, out, settings, work, force=force)


def as_json(lm: LanguageModel, question: Asked, seen: Trace, model: str, settings: Settings) -> dict[str, Any]:
    """Everything the page and the picture show; values are probabilities [layer][token]."""
    start, stop = seen.subject
    labels = [
        label(lm.tokenizer, token) + ("*" if start <= position < stop else "")
        for position, token in enumerate(seen.tokens)
    ]
    answer = answer_name(lm, question, seen.answer)
    so_far = [label(lm.tokenizer, token) for token in question.answer]
    grids = [
        {
            "title": site,
            "note": f"window of {settings.window} layers" if site.endswith(WINDOWED) else "one layer",
            "columns": so_far if site.startswith("decoder.") else labels,
            "rows": [str(layer) for layer in range(len(grid))],
            "values": [[float(f"{value:.5g}") for value in row] for row in grid.tolist()],
            "neutral": seen.corrupted,
        }
        for site, grid in seen.restored.items()
    ]
    return {
        "title": "causal tracing",
        "model": model,
        "metric": f"probability of {answer}",
        "clean": float(f"{seen.clean:.5g}"),
        "corrupted": float(f"{seen.corrupted:.5g}"),
        "sigma": round(seen.sigma, 5),
        "answer": answer,
        "example": {
            "prompt": settings.prompt,
            "subject": f"{settings.subject} (*), noise of {settings.deviations:g} standard deviations of the embeddings"
            f" = {seen.sigma:.3g}, {settings.samples} samples",
        },
        "low": "",
        "high": "",
        "grids": grids,
    }

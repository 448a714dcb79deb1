"""See what the model would say after every layer of a prompt: the logit lens, of one model or of two side by side.

    bildung look logit_lens SOURCE OUT --prompt "The capital of France is"
    bildung look logit_lens TUNED OUT --prompt "..." --against BASE
    bildung look logit_lens SOURCE OUT --prompt "..." --tuned LENS      through a tuned lens (look tuned_lens made it)
    bildung look logit_lens BERT OUT --prompt "Paris is in [MASK]."     what stands at each place, by its masked head
    bildung look logit_lens T5 OUT --prompt "a source" [--answer "..."] its decoder, while it answers

OUT gets lens.html (one file, works offline), lens.png and lens.json. The computation is in lens.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.lenses.lens import LensDifference, LogitLens, lens_difference
from bildung.look.lenses.lens import logit_lens as read_lens
from bildung.look.lenses.translators import read_lens as read_tuned
from bildung.look.pages import lens_page, picture
from bildung.look.pages.page import command_of
from bildung.look.precise import load_precise


@settings_class
class Settings:
    """The logit lens."""

    prompt: str  # the text to read
    chat: bool = False  # the prompt is a user's turn, put through the model's chat template
    answer: str | None = (
        None  # of a model that answers a source (the prompt): the answer that is read; default: its own
    )
    against: Path | None = None  # a second model (B) that reads the same tokens
    tuned: Path | None = None  # directory of a tuned lens for the source
    against_tuned: Path | None = None  # the same for B
    max_tokens: int = 96  # refuse longer prompts: each token is a column


def logit_lens(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page, the picture and the numbers. Raises DataError or TokenizerError for what cannot be read."""
    named = {"against": settings.against, "tuned": settings.tuned, "against_tuned": settings.against_tuned}
    companions = {name: path for name, path in named.items() if path is not None}
    if settings.against_tuned is not None and settings.against is None:
        raise SettingsError("against_tuned is the lens of `against`, and no second model was given.")

    def work(job: Job) -> None:
        lm, prompt, chat, longest = load_precise(source), settings.prompt, settings.chat, settings.max_tokens
        model, against = Path(source).name, settings.against.name if settings.against else None
        lens = read_tuned(settings.tuned, lm) if settings.tuned else None
        answer = settings.answer
        seen: LogitLens | LensDifference
        if settings.against is None:
            seen = read_lens(lm, prompt, chat=chat, max_tokens=longest, tuned=lens, answer=answer)
        else:
            b = load_precise(settings.against)
            lenses = lens, read_tuned(settings.against_tuned, b) if settings.against_tuned else None
            seen = lens_difference(lm, b, prompt, chat=chat, max_tokens=longest, tuned=lenses, answer=answer)
        numbers = as_json(seen, prompt, chat, lm.config.vocab_size, model, against)
        numbers["tuned"] = [settings.tuned is not None, settings.against_tuned is not None]
        text = json.dumps(numbers, ensure_ascii=False, allow_nan=False)
        (job.out / "lens.json").write_text(text + "\n", encoding="utf-8")
        (job.out / "lens.html").write_text(lens_page.page(numbers, summary(numbers), command_of(job)), encoding="utf-8")
        picture.draw_lens(numbers, job.out / "lens.png")
        job.tokens_seen = len(numbers["tokens"])
        job.measured = summary(numbers)

    return perform("look logit_lens", source, out, settings, work, companions=companions, force=force)


def as_json(
    seen: LogitLens | LensDifference, prompt: str, chat: bool, vocabulary: int, model: str, against: str | None
) -> dict[str, Any]:
    """Everything the page and the picture show. Lists are [layer][position], candidates most probable first."""
    a, b = (seen.a, seen.b) if isinstance(seen, LensDifference) else (seen, None)
    numbers: dict[str, Any] = {"model": model, "against": against, "prompt": prompt, "chat": chat}
    numbers |= {"tokens": a.tokens, "labels": a.labels, "vocabulary": vocabulary, "a": _side(a)}
    numbers["in_place"] = a.in_place
    numbers["words"] = {str(number): word for number, word in (a.words | (b.words if b else {})).items()}
    if isinstance(seen, LensDifference):
        numbers |= {"b": _side(seen.b), "kl_ab": _rounded(seen.kl_NL), "first_difference": seen.first_L.tolist()}
    return numbers


def _side(lens: LogitLens) -> dict[str, Any]:
    return {
        "top_ids": lens.top_ids_NLK.tolist(),
        "top_probs": _rounded(lens.top_probs_NLK),
        "rank": lens.rank_NL.tolist(),
        "kl": _rounded(lens.kl_NL),
        "entropy": _rounded(lens.entropy_NL),
        "next_probs": _rounded(lens.next_probs_NL),
    }


def _rounded(numbers: Tensor) -> Any:
    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        return float(f"{value:.4g}") if math.isfinite(value) else None

    return walk(numbers.tolist())


def summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that go into the record."""
    side, words, layers = numbers["a"], numbers["words"], len(numbers["a"]["rank"])
    # Where a prediction settles: the first layer from which on it stays at rank 1.
    settled = []
    for ranks in zip(*side["rank"], strict=True):
        layer = layers - 1
        while layer > 0 and ranks[layer - 1] == 1:
            layer -= 1
        settled.append(layer)
    # A masked encoder says something at every place; the one named here is where it is most in doubt.
    in_place, told = numbers["in_place"], side["top_probs"][-1]
    at = min(range(len(told)), key=lambda place: told[place][0]) if in_place else -1
    measured = {
        "positions": len(numbers["tokens"]),
        "layers": layers,
        f"in place of {numbers['labels'][at]}" if in_place else "next token": words[str(side["top_ids"][-1][at][0])],
        "its probability": told[at][0],
        "settled at layer, mean": round(sum(settled) / len(settled), 2),
    }
    if "b" in numbers:
        last = numbers["kl_ab"][-1]
        tops = [[top[0] for top in numbers[side]["top_ids"][-1]] for side in "ab"]
        measured["KL(A‖B) of the predictions, mean, nats"] = float(f"{sum(last) / len(last):.4g}")
        measured["positions with another top token"] = sum(p != q for p, q in zip(*tops, strict=True))
    return measured

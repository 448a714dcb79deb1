"""The index of a model's pages: what the model is, how the prompt became tokens, and the way to every look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bildung.core.errors import TokenizerError
from bildung.core.operation import Job
from bildung.look.index import EXPLAINED
from bildung.look.pages.page import command_of, data_url, look_page
from bildung.look.prompt import encode_prompt, label
from bildung.model.count import count, totals
from bildung.model.store import LanguageModel, load
from bildung.tokens.bpe import Merge
from bildung.tokens.trace import Tracer, Word
from bildung.tokens.unigram import Segmentation
from bildung.tokens.wordpiece import Match

LONGEST = 512  # tokens
# A page's file, and the picture of it that the index shows.
FILES = {
    "lens": ("lens.html", "lens.png"),
    "attention": ("attention.html", "attention.png"),
    "heads": ("heads.html", None),
    "compare": ("compare.html", None),
}


@dataclass
class Tokens:
    """The prompt as a model reads it."""

    ids: list[int]
    labels: list[str]
    rows: list[dict[str, str]]  # of its words: how each became tokens
    untraced: str  # why there are none
    facts: list[tuple[str, str]]  # of the model


def tokens_of(source: Path, prompt: str, chat: bool) -> Tokens:
    """Raises DataError for no token or too many."""
    lm = load(source)
    ids = encode_prompt(lm, prompt, chat, LONGEST)
    labels = [label(lm.tokenizer, number) for number in ids]
    try:
        tracer = Tracer(lm.tokenizer)
        rows, untraced = [_row(word) for word in tracer(prompt)], ""
    except TokenizerError as error:
        rows, untraced = [], str(error)
    return Tokens(ids, labels, rows, untraced, facts(lm, len(ids)))


def _row(word: Word) -> dict[str, str]:
    return {
        "word": word.text,
        "start": " ".join(word.start),
        "steps": "; ".join(filter(None, map(_step, word.steps))),
        "tokens": " ".join(word.tokens),
        "ids": " ".join(map(str, word.ids)),
    }


def _step(step: Merge | Match | Segmentation) -> str:
    if isinstance(step, Merge):
        return f"{step.left} + {step.right}"
    if isinstance(step, Match):
        return f"{step.piece} after {len(step.tried)} tries" if step.piece is not None else "nothing fits"
    return f"{' '.join(step.pieces)} ({step.score:.1f})"


def facts(lm: LanguageModel, length: int) -> list[tuple[str, str]]:
    """What kind of model it is, in a few numbers."""
    config, parameters = lm.config, totals(count(lm.model, length))[0]
    found = [
        ("family", config.model_type),
        ("kind", config.kind),
        ("parameters", f"{parameters:,}"),
        ("layers", str(config.num_hidden_layers)),
        ("width", f"{config.hidden_size:,}"),
        ("heads", str(getattr(config, "num_attention_heads", "none"))),
        ("vocabulary", f"{config.vocab_size:,}"),
    ]
    return found + ([("made by", lm.record.operation)] if lm.record is not None else [])


def write_index(job: Job, tokens: Tokens, made: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, str]) -> None:
    """index.html in the job's place; `made` has the figures of every page that is there."""
    pages = []
    for name, measured in made.items():
        file, picture = FILES[name]
        drawn = job.out / name / picture if picture else None
        pages.append(
            {
                "link": f"{name}/{file}#index",
                "title": EXPLAINED[name][0],
                "what": EXPLAINED[name][1],
                "picture": data_url(drawn) if drawn is not None and drawn.is_file() else None,
                "facts": [(key, _short(value)) for key, value in measured.items()],
            }
        )
    against = job.settings.against
    text = look_page(
        "index.html",
        model=Path(job.source).name if job.source is not None else "",
        against=against.name if against is not None else None,
        prompt=job.settings.prompt,
        chat=job.settings.chat,
        tokens=list(zip(tokens.labels, tokens.ids, strict=True)),
        rows=tokens.rows,
        untraced=tokens.untraced,
        facts=tokens.facts,
        pages=pages,
        left_out=[(EXPLAINED[name][0], reason) for name, reason in left_out.items()],
        command=command_of(job),
    )
    (job.out / "index.html").write_text(text, encoding="utf-8")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

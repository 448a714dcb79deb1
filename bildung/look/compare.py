"""Compare two models from inside: predictions, lenses, heads, weights, representations, and which activations differ.

    bildung look compare A B OUT --prompt "The capital of France is"
    bildung look compare base tuned OUT --prompt "..." --answer " Paris" --wrong " Rome" --data nursery:sotu

The question every operation raises: what did it change, where, and what carries the change? A and B may be plain,
tuned, quantized, pruned, merged or edited models, and adapters; two on one base hold it once (model/twin.py). OUT gets
compare.html (one file, works offline) and compare.json. From Python: `compare_models(*load_both(A, B), "...")`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bildung.core.errors import DataError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.examples import clm_examples
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.look.causal.cross_patching import Across, Over, Question
from bildung.look.comparing.comparison import Align, Comparison, answer_ids, compare_models
from bildung.look.pages import compare_page
from bildung.look.pages.page import command_of
from bildung.look.prompt import encode_prompt
from bildung.model.store import LanguageModel
from bildung.model.twin import load_both

PIECE = 128  # tokens of each piece of `data`


@settings_class
class Given:
    """What is looked at."""

    prompt: str | None = None  # the text that both read; none: their weights alone are compared
    chat: bool = False  # the prompt is a user's turn, put through A's chat template
    align: Align = "tokens"  # text: models of different tokenizers, by pieces of the text that both have
    data: str | None = None  # more text, for the similarity of layers and the mean difference of predictions
    data_tokens: int = 512  # how much of it
    answer: tuple[str, ...] = ()  # next tokens; with `wrong`, patches are measured by their logit difference, not by KL
    wrong: tuple[str, ...] = ()  # next tokens that the answers are measured against
    over: Over = "last"  # the KL that patches are measured by: after the last token, or its mean over all
    sites: tuple[str, ...] = ("resid_post", "attn.out", "mlp.out")  # patched at each position
    heads: tuple[str, ...] = ("attn.result",)  # patched at each head
    columns: int = 32  # at most so many positions are patched one by one; more are taken in stretches
    batch_size: int = 16  # patches at a time
    max_tokens: int = 96  # refuse longer prompts
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of unquantized weights and of activations
    seed: int = 0  # of the random tokens that heads are tried on


@settings_class
class Settings(Given):
    """A comparison of two models."""

    against: Path  # B


@settings_class
class Command:
    """Compare two models from inside."""

    a: tyro.conf.Positional[Path]  # the first model, for instance before an operation
    b: tyro.conf.Positional[Path]  # the second, for instance after it
    out: tyro.conf.Positional[Path]  # directory to make
    settings: Annotated[Given, tyro.conf.arg(name="")] = Given()
    force: bool = False  # make it even if up to date, and replace what OUT holds


def command(settings: Command) -> None:
    """`bildung look compare A B OUT`."""
    given = {one.name: getattr(settings.settings, one.name) for one in dataclasses.fields(Given)}
    record = compare(settings.a, settings.out, Settings(against=settings.b, **given), force=settings.force)
    for name, value in record.measured.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    for note in record.notes:
        print(f"left out: {note}")
    print(settings.out / "compare.html")


def compare(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page and the numbers. Raises TokenizerError for tokenizers that differ (unless --align text), DataError,
    SettingsError."""

    def work(job: Job) -> None:
        a, b = load_both(source, settings.against, settings.dtype)
        for lm in (a, b):
            lm.model.eval()
        found = comparison(a, b, settings)
        names = Path(source).name, settings.against.name
        numbers = compare_page.as_json(found, *names, settings.prompt, settings.chat, a.config.vocab_size)
        text = json.dumps(numbers, ensure_ascii=False, allow_nan=False)
        (job.out / "compare.json").write_text(text + "\n", encoding="utf-8")
        (job.out / "compare.html").write_text(compare_page.page(numbers, command_line(job)), encoding="utf-8")
        job.tokens_seen = len(found.ids)
        job.measured = compare_page.summary(numbers)
        job.notes += [f"{part}: {reason}" for part, reason in found.left_out.items()]

    companions = {"against": settings.against}
    data = fingerprint(settings.data) if settings.data is not None else None
    return perform("look compare", source, out, settings, work, data=data, companions=companions, force=force)


def command_line(job: Job) -> str:
    """What makes a job's result again, with B beside A."""
    words = shlex.split(command_of(job))
    at = words.index("--against")
    b = words.pop(at + 1)
    del words[at]
    return shlex.join([*words[:4], b, *words[4:]])


def comparison(a: LanguageModel, b: LanguageModel, settings: Given) -> Comparison:
    """Compare two models as the settings say."""
    question = None
    if settings.prompt is not None and settings.align == "tokens" and a.config.kind != "vision":
        question = Question(
            tuple(encode_prompt(a, settings.prompt, settings.chat, settings.max_tokens)),
            "logit_difference" if settings.answer or settings.wrong else "kl",
            settings.over,
            answer_ids(a, settings.answer),
            answer_ids(a, settings.wrong),
        )
        question.check()
    patched: list[tuple[str, Across]] = [(site, "position") for site in settings.sites]
    patched += [(site, "head") for site in settings.heads]
    return compare_models(
        a,
        b,
        settings.prompt,
        chat=settings.chat,
        align_by=settings.align,
        more_text=_pieces(a, settings),
        question=question,
        sites=patched,
        columns=settings.columns,
        batch_size=settings.batch_size,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
    )


def _pieces(lm: LanguageModel, settings: Given) -> Sequence[Sequence[int]]:
    if settings.data is None or settings.prompt is None or lm.config.kind == "vision":
        return ()
    length = min(PIECE, lm.config.max_position_embeddings)
    rows: list[list[int]] = []
    for text in documents(settings.data):  # as far as is needed: a collection may be long
        pieces = clm_examples(lm.tokenizer, [text], length)
        rows += [piece.tokens for piece in pieces if len(piece) == length]
        if len(rows) * length >= settings.data_tokens:
            return rows[: max(1, settings.data_tokens // length)]
    if not rows:
        raise DataError(f"no document of {settings.data} has {length} tokens; give longer ones.")
    return rows

"""The pages of one model, or of two side by side, in one folder: tokens, lens, attention, heads, comparison.

    bildung look MODEL --open                                           makes MODEL-look and opens it in the browser
    bildung look index MODEL OUT --prompt "..." --against OTHER         in a place of its own, beside a second model

OUT gets index.html, which shows how the prompt became tokens and leads to the others, and a folder for each of them,
made by the look of that name with the same prompt. What a kind of model does not have (an encoder no lens) is left
out, and the page says why. All of it works without a network or a server.
"""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from bildung.core.errors import DataError, SettingsError, TokenizerError
from bildung.core.operation import Job, OccupiedError, perform
from bildung.core.record import Record, read_record
from bildung.core.settings import settings as settings_class

PROMPT = "When Mary and John went to the store, John gave a drink to"
EXPLAINED = {
    "lens": ("Lens", "what the model would say after every layer"),
    "attention": ("Attention", "where every head looks on the prompt"),
    "heads": ("Heads", "which heads copy, look back, do induction"),
    "compare": ("Comparison", "all that tells the two models apart"),
}


@settings_class
class Settings:
    """The pages of a model."""

    prompt: str = PROMPT  # the text that is read
    chat: bool = False  # it is a user's turn, put through the model's chat template
    against: Path | None = None  # a second model (B) that reads the same tokens


@settings_class
class Command(Settings):
    """`bildung look MODEL`."""

    source: tyro.conf.Positional[Path]  # the model: a directory
    out: tyro.conf.Positional[Path | None] = None  # directory to make; default: SOURCE-look, beside SOURCE
    open: bool = False  # show it in the browser
    force: bool = False  # make it even if up to date, and replace what OUT holds


def command(settings: Command) -> None:
    """`bildung look MODEL [OUT] --open`."""
    source = settings.source.expanduser()
    given = Settings(prompt=settings.prompt, chat=settings.chat, against=settings.against)
    if settings.out is not None:
        out = settings.out.expanduser()
        index(source, out, given, force=settings.force)
    else:
        place = source.resolve()
        out = source.parent / f"{source.name}-look" if source.name else place.parent / f"{place.name}-look"
        try:
            index(source, out, given, force=settings.force)
        except OccupiedError:  # another prompt: the place is ours unless something else was made there
            record = read_record(out)
            if record is None or record.operation != "look index":
                raise
            index(source, out, given, force=True)
    page = (out / "index.html").resolve()
    print(page)
    if settings.open and not webbrowser.open(page.as_uri()):
        raise SettingsError(f"no browser could be started; open {page} in one.")


def index(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the folder. Raises DataError for an empty prompt, TokenizerError when two models share no tokens."""
    from bildung.look.pages.index_page import (  # here: `bildung --help` must not wait for torch
        Tokens,
        tokens_of,
        write_index,
    )

    source = Path(source)
    against = settings.against.expanduser() if settings.against is not None else None
    companions = {"against": against} if against is not None else {}

    def work(job: Job) -> None:
        tokens: Tokens = tokens_of(source, settings.prompt, settings.chat)  # refuses what no look could read
        made: dict[str, Record] = {}
        left_out: dict[str, str] = {}
        for name, look in looks(source, settings, against).items():
            try:
                made[name] = look(job.out / name)
            except (DataError, TokenizerError) as error:
                left_out[name] = str(error)
        job.tokens_seen = sum(record.tokens_seen for record in made.values())
        job.measured = {"pages": len(made) + 1, "tokens of the prompt": len(tokens.labels)}
        job.notes = [f"no {name}: {reason}" for name, reason in left_out.items()]
        write_index(job, tokens, {name: record.measured for name, record in made.items()}, left_out)

    return perform("look index", source, out, settings, work, companions=companions, force=force)


def looks(source: Path, settings: Settings, against: Path | None) -> dict[str, Callable[[Path], Record]]:
    """{name: makes that look in the directory it is given}, in the order of the page."""
    from bildung.look import attention, compare, heads, logit_lens

    given: dict[str, Any] = {"prompt": settings.prompt, "chat": settings.chat, "against": against}
    made: dict[str, Callable[[Path], Record]] = {
        "lens": lambda out: logit_lens.logit_lens(source, out, logit_lens.Settings(**given)),
        "attention": lambda out: attention.attention(source, out, attention.Settings(**given)),
        "heads": lambda out: heads.heads(source, out, heads.Settings()),
    }
    if against is not None:
        made["compare"] = lambda out: compare.compare(source, out, compare.Settings(**given))
    return made

"""Show step by step how a text is split.

    bildung tokenizer trace "unaffable whales"                    by three tokenizers learned on the spot
    bildung tokenizer trace "unaffable whales" lives/words        by these

BPE: every merge with its rank. WordPiece: every piece tried, from long to short. Unigram: the best segmentation and the
runner-up with their scores, and, learned on the spot, what every round of the training removed and at what loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bildung.core.errors import SettingsError
from bildung.core.settings import settings
from bildung.tokenizer.corpus import Corpus
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import Learning
from bildung.tokens.bpe import Merge
from bildung.tokens.tokenizer import Tokenizer
from bildung.tokens.trace import Tracer, Word
from bildung.tokens.unigram import UNKNOWN_PENALTY, Segmentation
from bildung.tokens.unigram_training import Removed, Training
from bildung.tokens.wordpiece import Match

SHOWN = 3  # pieces named per round of pruning


@settings
class Command:
    """Show step by step how a text is split."""

    text: tyro.conf.Positional[str]  # what to split
    tokenizers: tyro.conf.Positional[tuple[Path, ...]] = ()  # directories; none: learn bpe, wordpiece and unigram
    data: str = "mini:moby"  # what to learn from
    limit: int = 12  # rows of it
    vocab_size: int = 1000  # size of what is learned


def command(settings: Command) -> None:
    """`bildung tokenizer trace`. Raises TokenizerError, DataError and SettingsError."""
    if not settings.text.strip():
        raise SettingsError("the text is empty; give what to split: bildung tokenizer trace TEXT [DIRECTORY ...]")
    if settings.tokenizers and Path(settings.text).is_dir() and not settings.tokenizers[0].exists():
        raise SettingsError(
            f"{settings.text} is a directory; the text comes first: bildung tokenizer trace TEXT {settings.text}"
        )
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # the rounds of the pruning, each in a line
    for path in settings.tokenizers:
        show(console, path.name, Tracer(Tokenizer.load(path.expanduser())), settings.text)
    if settings.tokenizers:
        return
    corpus = Corpus([settings.data], limit=settings.limit)
    for algorithm in ("bpe", "wordpiece", "unigram"):
        learned = learn(corpus.training, Learning(algorithm=algorithm, vocab_size=settings.vocab_size))
        tracer = Tracer(learned.tokenizer)
        show(console, f"{algorithm}, {learned.tokenizer.vocab_size} tokens from {settings.data}", tracer, settings.text)
        if learned.training is not None:
            show_pruning(console, learned.training, [word.text for word in tracer(settings.text)])


# ── printing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def show(console: Console, name: str, tracer: Tracer, text: str) -> None:
    """Prints every step of every word."""
    console.print(Text(f"\n{name}", "bold cyan"), soft_wrap=True)
    for word in tracer(text):
        console.print(Text.assemble((word.text, "bold"), f"   {' '.join(word.start)}"), soft_wrap=True)
        for line in lines(word, tracer):
            console.print(line, soft_wrap=True)
        ids = " ".join(map(str, word.ids))
        console.print(Text.assemble("    = ", (" ".join(word.tokens), "green"), f"   {ids}"), soft_wrap=True)


def lines(word: Word, tracer: Tracer) -> list[Text]:
    """The steps of one word."""
    width = max((len(step.left + step.right) for step in word.steps if isinstance(step, Merge)), default=0) + 3
    found = []
    for number, step in enumerate(word.steps):
        if isinstance(step, Merge):
            pair = f"{step.left} + {step.right}"
            found.append(Text(f"    rank {step.rank:>6}   {pair:<{width}}   {' '.join(step.pieces)}"))
        elif isinstance(step, Match):
            found.append(_match(step, tracer))
        elif isinstance(step, Segmentation):
            found.append(_segmentation(step, word.steps[0] if number else None, tracer))
    if not word.steps and tracer.algorithm == "WordLevel":
        found.append(Text("    in the vocabulary" if word.text in word.tokens else "    not in the vocabulary"))
    return found


def _match(step: Match, tracer: Tracer) -> Text:
    if not step.tried:
        return Text(f"    {len(step.rest)} characters are too many: the whole word is unknown", "yellow")
    tried = [*step.tried[:3], "...", *step.tried[-2:]] if len(step.tried) > 5 else list(step.tried)
    if step.piece is None:
        unknown = tracer.model["unk_token"]
        return Text(f"    {' '.join(tried)}").append(f"   no piece fits: the whole word is {unknown}", "yellow")
    before = "".join(f"{piece} " for piece in tried[:-1])
    tries = f"{len(step.tried)} tries" if len(step.tried) > 1 else "1 try"
    return Text(f"    {before}").append(step.piece, "green").append(f"   found after {tries}")


def _segmentation(one: Segmentation, best: Any, tracer: Tracer) -> Text:
    """`best`: the segmentation that beat this one, None for the best."""
    parts = "  ".join(f"{piece} {_score(piece, tracer):.2f}" for piece in one.pieces)
    line = f"    {'runner-up' if best else 'best':<9} {one.score:>8.2f}   {parts}"
    if best is None:
        return Text(line)
    behind = best.score - one.score
    odds = "as likely" if behind < 1e-6 else f"{math.exp(min(behind, 99)):,.3g} times less likely"
    return Text(f"{line}   {behind:.2f} nats behind, {odds}")


def _score(piece: str, tracer: Tracer) -> float:
    scores = dict(tracer.model["vocab"])
    return scores.get(piece, min(scores.values()) - UNKNOWN_PENALTY)


def show_pruning(console: Console, training: Training, words: Sequence[str]) -> None:
    """Prints the rounds of a Unigram training, and what of the words' possible pieces each removed."""
    table = Table(
        title="how the Unigram vocabulary was pruned: EM twice, then what is missed least goes (loss in nats per word)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("round", "pieces", "nats per word", "unused", "pruned"):
        table.add_column(name, justify="right")
    for name in ("missed least", "missed most", "of the text, removed"):
        table.add_column(name, overflow="fold")
    for number, one in enumerate(training.rounds, 1):
        pruned = [removed for removed in one.removed if removed.uses] or list(one.removed)
        gone = [*one.unused, *(removed.piece for removed in one.removed)]
        ours = [piece for piece in gone if any(piece in word for word in words)]
        table.add_row(
            str(number),
            str(one.pieces),
            f"{one.nats[-1]:.3f}",
            str(len(one.unused)),
            str(len(one.removed)),
            Text("\n".join(_loss(removed) for removed in pruned[:SHOWN])),
            Text("\n".join(_loss(kept) for kept in one.kept[: -SHOWN - 1 : -1])),
            Text(" ".join(sorted(ours, key=len)[-8:])),
        )
    console.print()
    console.print(table)


def _loss(candidate: Removed) -> str:
    return f"{candidate.piece} → {' '.join(candidate.instead)} {candidate.loss:.1e}"

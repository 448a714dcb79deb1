"""Activations of a data set: vectors of words or of whole texts, at every site that is asked for, in one pass.

    sentence -> tokens -> model, read once -> at each site: rows of the tokens that stand for a word -> one vector

A word of several tokens is its last one by default (which in a causal model has seen all of the word), or its first,
or the mean. A token that stands for two words at once has no vector that is one word's: such words are left out,
counted and named.
"""

# B batch, L length, N vectors in all, F numbers of one vector

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bildung.core.errors import DataError, NoSuchSite
from bildung.data.seq2seq import text_frame
from bildung.data.tagged import Label, Tagged, prose
from bildung.look.precise import check_numbers
from bildung.look.probing.vectors import Vectors
from bildung.model.store import LanguageModel
from bildung.model.taps import match_sites, observe, sites
from bildung.tokens.frames import Frame, decoder_frame, encode_sentence, frame_of
from bildung.tokens.spans import encode_with_spans, tokens_of

Piece = Literal["last", "first", "mean"]
BATCH_TOKENS = 2048
NAMED = 5  # examples of each reason


@dataclass(frozen=True)
class Read:
    """One text as the model reads it. picks: for every vector that is wanted, the places of its tokens."""

    tokens: list[int]
    picks: list[list[int]]


@dataclass
class Units:
    """What has a label: words, or whole texts. sentence: the text that each unit is in. type: the word itself."""

    reads: list[Read]
    labels: list[Label] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    sentence: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, example: str) -> None:
        """Count a unit that has no vector."""
        self.left_out[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(example)

    def report(self) -> list[str]:
        """What was left out, a line for each reason."""
        return [f"{count} left out: {reason} ({', '.join(self.examples[reason])}{', ...' if count > NAMED else ''})"
                for reason, count in self.left_out.most_common()]  # fmt: skip


def word_units(lm: LanguageModel, sentences: Sequence[Tagged], piece: Piece, max_length: int) -> Units:
    """The words of tagged sentences. Raises DataError when no word is left."""
    frame, units = frame_for(lm), Units([])
    for number, one in enumerate(sentences):
        text, spans = prose(one.words)
        ids, pieces = encode_with_spans(lm.tokenizer, text)
        places = tokens_of(spans, pieces)
        shared = Counter(place for mine in places for place in mine)
        room, picks = max_length - frame.size(pair=False), []
        for word, label, span, mine in zip(one.words, one.labels, spans, places, strict=True):
            chosen = {"last": mine[-1:], "first": mine[:1], "mean": mine}[piece]
            name = f"{word!r} in {one.place}"
            if span[0] == span[1]:
                units.leave_out("a doubled punctuation mark", name)
            elif not mine:
                units.leave_out("no token stands for the word", name)
            elif any(shared[place] > 1 for place in chosen):
                units.leave_out("its token stands for a neighbour too", name)
            elif chosen[-1] >= room:
                units.leave_out(f"beyond max_length = {max_length} tokens", name)
            else:
                picks.append([len(frame.before) + place for place in chosen])
                units.labels.append(label)
                units.types.append(word)
                units.sentence.append(number)
        units.reads.append(Read(frame.put(ids[:room]).tokens, picks))
    if not units.labels:
        raise DataError("no word has both a label and a vector: " + "; ".join(units.report()))
    return units


def text_units(lm: LanguageModel, texts: Sequence[tuple[str, Label]], pooling: Piece, max_length: int) -> Units:
    """Whole texts: the mean of their tokens' vectors, the first one's ([CLS] where there is one) or the last one's.
    Their type, which a control task gives its labels by, is the last word."""
    frame, units = frame_for(lm), Units([])
    for number, (text, label) in enumerate(texts):
        words = ["".join(letter for letter in word if letter.isalnum()) for word in text.lower().split()]
        tokens = encode_sentence(lm.tokenizer, frame, text, None, max_length).tokens
        inside = list(range(len(frame.before), len(tokens) - len(frame.after)))
        if not inside:
            units.leave_out("a text without a token", f"text {number + 1}")
            continue
        units.reads.append(Read(tokens, [{"mean": inside, "first": [0], "last": inside[-1:]}[pooling]]))
        units.labels.append(label)
        units.types.append(next((word for word in reversed(words) if word), ""))
        units.sentence.append(len(units.reads) - 1)
    if not units.labels:
        raise DataError("no text has a vector: " + "; ".join(units.report()))
    return units


def frame_for(lm: LanguageModel) -> Frame:
    """The special tokens around a text that this model reads."""
    if lm.config.kind == "vision":
        raise DataError(f"a {lm.config.model_type} reads images; words and texts cannot be probed in it.")
    if hasattr(lm.model, "given"):
        return text_frame(lm.tokenizer)
    return frame_of(lm.tokenizer) if lm.config.kind == "encoder" else decoder_frame(lm.tokenizer)


def vector_sites(lm: LanguageModel, patterns: Sequence[str]) -> list[str]:
    """The sites that fit and have a vector for every token. Without patterns: the residual stream below the first
    layer and after each. Raises NoSuchSite for others."""
    prefix = "encoder." if hasattr(lm.model, "given") else ""
    chosen = match_sites(lm.model, patterns or (f"{prefix}layers.0.resid_pre", f"{prefix}layers.*.resid_post"))
    shapes = sites(lm.model)
    for name in chosen:
        shape = shapes[name].split()
        if shape[:2] != ["B", "L"] or "S" in shape or not name.startswith(prefix):
            why = f"has the shape {shapes[name]}" if name.startswith(prefix) else "is not reached by reading a text"
            raise NoSuchSite(
                f"{name} {why}; a probe needs a vector for each token read, such as {prefix}layers.0.mlp.out."
            )
    return chosen


@torch.no_grad()
def collect(
    lm: LanguageModel,
    reads: Sequence[Read],
    chosen: Sequence[str],
    *,
    folder: Path | None = None,
    most_bytes: float = 0.0,
    advance: Callable[[int], None] = lambda texts: None,
) -> dict[str, Tensor]:
    """{site: vectors NF, on the CPU, in the type the model runs in}, in the order of reads and their picks.

    Each text is read once, whatever the number of sites. Memory: N x F numbers for each site; where that is more than
    `most_bytes`, they lie in files of `folder` (vectors.py), where an interrupted reading goes on.
    """
    counts, batches = [len(read.picks) for read in reads], _batches(reads)
    starts = _running(counts)
    found = Vectors(sum(counts), len(batches), folder, most_bytes)
    run, was_training = _runner(lm, "logits" in chosen), lm.model.training
    lm.model.eval()
    with observe(lm.model, list(chosen)) as seen:
        for number, batch in enumerate(batches):
            advance(len(batch))
            if number < found.done:
                continue
            L = max(len(reads[i].tokens) for i in batch)
            tokens_BL = torch.zeros(len(batch), L, dtype=torch.int64)
            keep_BL = torch.zeros(len(batch), L, dtype=torch.bool)
            places: list[int] = []
            owners: list[int] = []
            target: list[int] = []
            for row, i in enumerate(batch):
                tokens_BL[row, : len(reads[i].tokens)] = torch.tensor(reads[i].tokens)
                keep_BL[row, : len(reads[i].tokens)] = True
                for offset, pick in enumerate(reads[i].picks):
                    places += [row * L + place for place in pick]
                    owners += [len(target)] * len(pick)
                    target.append(starts[i] + offset)
            if not target:
                found.put({}, [])
                continue
            run(tokens_BL.to(lm.model.device), keep_BL.to(lm.model.device))
            at = torch.tensor(places, device=lm.model.device)
            rows = {name: seen[name].flatten(2).flatten(0, 1)[at] for name in chosen}
            for name, x in rows.items():
                check_numbers(x, name)
            found.put({name: _means(x, owners, len(target)) for name, x in rows.items()}, target)
    lm.model.train(was_training)
    return found.tensors


def _means(rows_F: Tensor, owners: list[int], count: int) -> Tensor:
    if len(owners) == count:
        return rows_F
    owner = torch.tensor(owners, device=rows_F.device)
    sums = torch.zeros(count, rows_F.shape[1], device=rows_F.device).index_add_(0, owner, rows_F.float())
    return (sums / owner.bincount(minlength=count)[:, None]).to(rows_F.dtype)


def _running(counts: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return starts


def _batches(reads: Sequence[Read]) -> list[list[int]]:
    """Texts of like length together, at most BATCH_TOKENS with their padding."""
    batches: list[list[int]] = []
    for i in sorted(range(len(reads)), key=lambda i: len(reads[i].tokens)):
        if batches and len(reads[i].tokens) * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _runner(lm: LanguageModel, with_logits: bool) -> Callable[[Tensor, Tensor], object]:
    """Reads a padded batch. A causal model needs no mask for padding on the right, which no real token sees."""
    model = lm.model
    if hasattr(model, "given"):
        if with_logits:
            raise NoSuchSite("the logits of an encoder-decoder are of its target; probe its encoder.* sites.")
        return lambda tokens_BL, keep_BL: model.encode(tokens_BL, keep_BL)
    read = model if with_logits else model.hidden
    if lm.config.kind == "encoder":
        return lambda tokens_BL, keep_BL: read(tokens_BL, keep_BL=keep_BL)
    return lambda tokens_BL, keep_BL: read(tokens_BL)

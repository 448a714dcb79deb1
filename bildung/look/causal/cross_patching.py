"""Which activations carry the change? Activations of model B, put into model A while both read the same text.

    A   The capital of France is    p_A          one activation of A replaced by what B has in its place:
    B   The capital of France is    p_B          does A's answer become B's?

    recovered = (patched - A) / (B - A)          0: still A's answer, 1: B's

The text is one and the same, the models are two; otherwise this is activation patching (patching.py; Prakash et al.
2024, arXiv 2402.14811, call it cross-model activation patching, and patch a base model from its fine-tunes). Metrics:

    kl                  KL(B ‖ run) after the last token, or its mean over all positions; needs no answers; B: 0
    logit_difference    mean logit of the answers - mean logit of the wrong ones, after the last token

That an activation carries a change does not say that it arises there: from the last patched layer on, a stream carries
all that came before. Where it arises, the weights' change and each head's own output (`attn.result`) say.

A column is a position or a head, or, of a long text, a stretch of positions. Models need not share weights, but must
have sites of the same shapes: they are tunes, edits or compressed copies of one architecture.
"""

# R rows of a batch, one patch each; L positions, N heads, D hidden_size, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from bildung.core.errors import DataError, SettingsError
from bildung.look.asked import stack_prefix
from bildung.look.causal.patching import cells, layer_sites, putting
from bildung.look.lenses.lens import kl
from bildung.look.prompt import label
from bildung.model.base import CausalLM
from bildung.model.store import LanguageModel
from bildung.model.taps import Tap, intervene, sites

Across = Literal["position", "head"]
Metric = Literal["kl", "logit_difference"]
Over = Literal["last", "all"]


@dataclass(frozen=True)
class Question:
    """What is asked of the patched model. answers, wrong: ids of next tokens, for the logit difference; over: the
    positions whose KL counts."""

    ids: tuple[int, ...]
    metric: Metric = "kl"
    over: Over = "last"
    answers: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()
    at: int | None = None  # of a masked encoder: the position whose token is asked for

    @property
    def name(self) -> str:
        """The metric in words."""
        if self.metric == "logit_difference":
            return "logit difference " + ("after the last token" if self.at is None else "at the mask")
        where = "after the last token" if self.at is None else "at the mask"
        return "KL(B‖run) " + (where if self.over == "last" else "over all positions")

    def check(self) -> None:
        """Raises SettingsError for a logit difference without answers on both sides."""
        if self.metric == "logit_difference" and not (self.answers and self.wrong):
            raise SettingsError("the logit difference needs an answer and a wrong one: --answer ... --wrong ...")


@dataclass(frozen=True)
class CrossGrid:
    """values: layers x columns, the metric with each patch; into, source: that of the two models without one."""

    site: str
    across: Across
    question: Question
    columns: list[str]
    values: Tensor
    into: float
    source: float

    @property
    def recovered(self) -> Tensor | None:
        """0: as the model patched into, 1: as the one patched from; None where the metric is the same in both."""
        if abs(self.source - self.into) < 1e-9:
            return None
        return (self.values - self.into) / (self.source - self.into)

    @property
    def strongest(self) -> tuple[int, int]:
        """(layer, column) of the patch that recovers most."""
        by = self.values if self.recovered is None else self.recovered
        layer, column = divmod(int(by.argmax()), by.shape[1])
        return layer, column


@torch.no_grad()
def cross_patching(
    into: LanguageModel,
    source: LanguageModel,
    question: Question,
    *,
    site: str = "resid_post",
    across: Across = "position",
    columns: int = 32,
    batch_size: int = 16,
) -> CrossGrid:
    """Patch `site` of every layer of `into` with what `source` has there, at each stretch of positions or each head.

    columns: at most so many stretches of positions. Raises SettingsError, DataError for models of unlike shapes.
    """
    question.check()
    if min(batch_size, columns) < 1:
        raise SettingsError(f"batch_size = {batch_size}, columns = {columns}; each is at least 1.")
    names = layer_sites(into.model, site)
    check_like(into.model, source.model, names)
    shape = sites(into.model)[names[0]]
    if across == "head":
        heads = _heads(into, site, shape)
        places: list[range] = [range(head, head + 1) for head in range(heads)]
        titles = [str(head) for head in range(heads)]
    else:
        prefix = stack_prefix(into.model)
        beside = prefix and not names[0].startswith(prefix)  # at the source that an answer is given to
        read = into.model.source if beside else question.ids
        places = stretches(len(read), columns)
        titles = [_title(into, read, place) for place in places]
    rows = min(batch_size, len(places))
    run = _Run(into, source, question, names, rows)
    nothing = run.values(names[0], _where(shape, run.seen[names[0]], across, [range(0)] * rows))
    values = torch.tensor([run.row(name, shape, across, places) for name in names])
    return CrossGrid(site, across, question, titles, values, nothing[0], run.of_source)


def check_like(a: CausalLM, b: CausalLM, names: Sequence[str]) -> None:
    """Raises DataError unless both models have these sites, in the same shapes."""
    if missing := [name for name in names if name not in b.sites]:
        raise DataError(f"the models have other layers: one has {missing[0]}, the other does not; nothing fits.")
    for what in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        first, second = getattr(a.config, what, 0), getattr(b.config, what, 0)
        if first != second:
            raise DataError(f"{what} is {first} and {second}: an activation of one does not fit into the other.")


def stretches(length: int, columns: int) -> list[range]:
    """Positions 0 ... length - 1 in at most so many stretches, as even as can be, the longer ones last."""
    count = min(length, columns)
    borders = [length * number // count for number in range(count + 1)]
    return [range(start, end) for start, end in pairwise(borders)]


class _Run:
    """The source's activations, and runs of the other model with some of them. Every run has the same number of rows,
    so that a patch with equal numbers gives equal logits, bit for bit."""

    def __init__(self, into: LanguageModel, source: LanguageModel, question: Question, names: Sequence[str], rows: int):
        self.model: CausalLM = into.model
        self.question, self.rows = question, rows
        self.tokens_RL = torch.tensor([question.ids] * rows, device=into.model.device)
        self.seen: dict[str, Tensor] = {}

        def keeper(name: str) -> Tap:
            def keep(x: Tensor) -> None:
                self.seen[name] = x[:1].to(into.model.device).clone()  # all rows are the same

            return keep

        with intervene(source.model, {name: keeper(name) for name in names}):
            source_1LD = source.model.hidden(self.tokens_RL.to(source.model.device))[:1]
        self.logits_LV = source.model.unembed(self._asked(source_1LD))[0].float().to(into.model.device)
        self.of_source = self._value(self.logits_LV)

    def row(self, name: str, shape: str, across: Across, places: Sequence[range]) -> list[float]:
        """The metric of one layer's patches, as many at a time as there are rows."""
        found: list[float] = []
        for start in range(0, len(places), self.rows):
            some = list(places[start : start + self.rows])
            some += [range(0)] * (self.rows - len(some))
            found += self.values(name, _where(shape, self.seen[name], across, some))
        return found[: len(places)]

    def values(self, name: str, where: Tensor) -> list[float]:
        """The metric of every row; row r is patched at the cells where[r]."""
        # A layer that is listened to may compute by other steps (explicit scores), so all are, as in the source.
        taps: dict[str, Tap] = {**dict.fromkeys(self.seen, _as_it_is), name: putting(self.seen[name], where)}
        with intervene(self.model, taps):
            h_RLD = self._asked(self.model.hidden(self.tokens_RL))
        # Row by row: the logits of all at once would be R x L x V numbers.
        return [self._value(self.model.unembed(h_1LD)[0].float()) for h_1LD in h_RLD.split(1)]

    def _asked(self, h_RLD: Tensor) -> Tensor:
        if self.question.over == "all" and self.question.metric == "kl":
            return h_RLD
        at = self.question.at
        return h_RLD[:, -1:] if at is None else h_RLD[:, at : at + 1]

    def _value(self, logits_LV: Tensor) -> float:
        if self.question.metric == "kl":
            return float(kl(self.logits_LV.log_softmax(-1), logits_LV.log_softmax(-1)).mean())
        answers, wrong = list(self.question.answers), list(self.question.wrong)
        return float(logits_LV[-1, answers].mean() - logits_LV[-1, wrong].mean())


def _as_it_is(x: Tensor) -> None:
    """A tap that changes nothing."""


def _where(shape: str, x: Tensor, across: Across, places: Sequence[range]) -> Tensor:
    """Cells of x, repeated for every row: in row r the positions or heads of places[r]."""
    if across == "position":
        return torch.cat([_one(shape, x, list(place), None) for place in places])
    return torch.cat([_one(shape, x, None, next(iter(place), -1)) for place in places])


def _one(shape: str, x: Tensor, positions: list[int] | None, head: int | None) -> Tensor:
    positions_1P = None if positions is None else torch.tensor([positions], dtype=torch.long, device=x.device)
    return cells(shape, x[:1], positions_1P, head)


def _heads(lm: LanguageModel, site: str, shape: str) -> int:
    letter: str = next(iter(_head_letters(shape)), "")
    if not letter:
        raise SettingsError(f"{site} ({shape}) has no heads; attn.result, attn.z, attn.q, attn.k and attn.v have.")
    return lm.config.num_attention_heads if letter == "N" else lm.config.num_key_value_heads


def _head_letters(shape: str) -> Iterator[str]:
    return (letter for letter in shape.split() if letter in "NK")


def _title(lm: LanguageModel, ids: Sequence[int], place: range) -> str:
    text = label(lm.tokenizer, ids[place[0]])
    return f"{place[0]} {text}" if len(place) == 1 else f"{place[0]}-{place[-1]} {text}…"

"""Beam search: several unfinished answers side by side, so that a good beginning is not lost to a better first word.

    width 2          a -.3        a b -.9        a b </s> -1.1    finished
    <start>  ------> b -1.2  ---> a c -1.0  ---> a c d    -1.4    running: can it still win?
                     c -2.0       b a -1.5

Each step extends every running hypothesis by every token and keeps the `beams` best. Those that end with a stop token
are finished; a longer answer has a smaller probability, so finished ones are compared by

    score = log P(Y) / lp(|Y|) + coverage      lp: ((5 + |Y|) / 6)^α  "wu", or |Y|^α  "average"
    coverage = β Σ_i log min(Σ_t a_ti, 1)      a_ti: attention of step t to word i of the source, mean of the heads

(Wu et al. 2016, arXiv 1609.08144, eq. 14; |Y| counts the stop token). The search must not end with the first finished
hypothesis, as joeynmt's did (PR 149): under a length penalty a running one may overtake it. No continuation is worth
more than log P now / lp(best length left), and when not even that beats the n-th best finished one, it is over.

`transformers` differs by default: early_stopping=False guesses by the present length; "never" is the rule used here.
"""

# B prompts, R rows: the running hypotheses of all prompts, L length, N heads, S source length, V vocabulary

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bildung.core.errors import ModelFileError, SettingsError
from bildung.core.settings import settings
from bildung.model.base import CausalLM
from bildung.model.taps import observe, sites
from bildung.run.decode import FORBIDDEN, Ids, LogitsRule, apply
from bildung.run.loop import WORTH_PACKING, check, last_logits, pad_left, positions_of, prefix_of, working


@settings
class Beam:
    """How wide to search and by what to compare answers. One beam is greedy decoding."""

    beams: int = 1  # hypotheses kept at each step; 1: greedy decoding
    length_penalty: float = 0.6  # alpha: 0 compares plain log-probabilities, above prefers longer answers
    length_norm: Literal["wu", "average"] = "wu"  # divide by ((5 + length) / 6)^alpha, or by length^alpha
    coverage_penalty: float = 0.0  # beta: above 0 prefers answers that attend to all of the source
    n_best: int = 1  # so many answers, the best first
    no_repeat_ngram: int = 0  # no n-gram of this length twice in prompt and answer; 0: allowed
    min_tokens: int = 0  # no stop token before so many tokens

    def check(self) -> None:
        """Raises SettingsError for a value out of range."""
        for name, least in (("beams", 1), ("n_best", 1), ("no_repeat_ngram", 0), ("min_tokens", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} = {getattr(self, name)}; it must be a whole number from {least}.")
        if self.n_best > self.beams:
            raise SettingsError(f"n_best = {self.n_best} of {self.beams} beams; set beams to at least {self.n_best}.")
        if not math.isfinite(self.length_penalty):
            raise SettingsError(f"length_penalty = {self.length_penalty}; it must be a finite number.")
        if not 0 <= self.coverage_penalty < math.inf:
            raise SettingsError(f"coverage_penalty = {self.coverage_penalty}; it must be a finite number from 0.")

    def penalty(self, length: int) -> float:
        """What the log-probability of an answer of `length` tokens, its stop token counted, is divided by."""
        base = (5 + length) / 6 if self.length_norm == "wu" else length
        return float(base**self.length_penalty)


@dataclass(frozen=True)
class Hypothesis:
    """An answer. tokens: with its stop token. log_probs: of each token, as in loop.Answer; what no_repeat_ngram and
    min_tokens forbid makes the rest no more probable. score: the one answers are compared by; None while it runs."""

    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    score: float | None = None
    ended: Literal["stop", "length"] = "length"

    @property
    def log_prob(self) -> float:
        """Of the whole answer, in nats."""
        return math.fsum(self.log_probs)


@dataclass
class Search:
    """The search for one prompt: it sees candidates and decides; the model's work is done outside."""

    beam: Beam
    new_tokens: int
    stop_ids: Collection[int]
    running: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])  # the most probable first
    finished: list[Hypothesis] = field(default_factory=list)  # the n best, the best first

    def advance(self, likeliest: Sequence[Sequence[tuple[int, float]]], coverage: Sequence[float]) -> list[int]:
        """One step: the next running hypotheses, and from which of the present ones each comes.

        likeliest: (token, log-probability) of the best continuations of each running hypothesis, at least as many as
        beams and stop tokens together. coverage: of each running hypothesis.
        """
        candidates = [
            (self.running[parent].log_prob + log_prob, parent, token, log_prob)
            for parent, continuations in enumerate(likeliest)
            for token, log_prob in continuations
        ]
        candidates.sort(key=lambda one: (-one[0], *one[1:3]))  # of equal ones the first parent, the lowest id
        last = len(self.running[0].tokens) + 1 == self.new_tokens
        parents: list[int] = []
        running: list[Hypothesis] = []
        for rank, (_, parent, token, log_prob) in enumerate(candidates):
            before, stops = self.running[parent], token in self.stop_ids
            longer = Hypothesis((*before.tokens, token), (*before.log_probs, log_prob))
            if rank < self.beam.beams and (stops or last):
                self._finish(longer, "stop" if stops else "length", coverage[parent])
            elif not stops and not last and len(running) < self.beam.beams:
                running.append(longer)
                parents.append(parent)
        self.running = running
        if self._is_over():
            self.running, parents = [], []
        return parents

    def _finish(self, one: Hypothesis, ended: Literal["stop", "length"], coverage: float) -> None:
        score = one.log_prob / self.beam.penalty(len(one.tokens)) + coverage
        self.finished.append(Hypothesis(one.tokens, one.log_probs, score, ended))
        self.finished.sort(key=lambda done: -done.score)  # type: ignore[operator]
        del self.finished[self.beam.n_best :]

    def _is_over(self) -> bool:
        """Whether no running hypothesis can still become one of the n best."""
        if not self.running or len(self.finished) < self.beam.n_best:
            return not self.running
        if self.beam.beams == 1:
            return True  # greedy decoding ends with its first stop token, whatever the penalty
        worst = self.finished[-1].score
        return worst is not None and best_attainable(self.running[0], self.beam, self.new_tokens) <= worst


def best_attainable(one: Hypothesis, beam: Beam, new_tokens: int) -> float:
    """No answer that begins with `one` has a higher score: tokens to come have log-probability 0 at best, coverage is 0
    at best, and the penalty is monotonic in the length, so one of the two extreme lengths is the most favourable."""
    return max(one.log_prob / beam.penalty(length) for length in (len(one.tokens) + 1, new_tokens))


# As a decorator, inference mode covers this function's own work only.
@torch.inference_mode()
def beam_search(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    beam: Beam,
    rules: Sequence[LogitsRule] = (),
    stop_ids: Collection[int] = (),
) -> list[list[Hypothesis]]:
    """For each prompt (token ids, of any lengths) the `n_best` answers, the best first; fewer where there are no more.

    What comes out for a prompt does not depend on the others. Of an encoder-decoder, give model.given(sources); the
    prompts are what the decoder starts with. rules: reshape the distribution, as in `decode`.
    Raises as `decode_steps`; SettingsError too for a value out of range, for a coverage penalty without
    cross-attention, and when no_repeat_ngram and min_tokens leave an answer no way on.
    """
    check(model, prompts, new_tokens)
    beam.check()
    searches = [Search(beam, new_tokens, stop_ids) for _ in prompts]
    tokens_BL, keep_BL = pad_left(prompts, model.device)
    kv_cache = model.kv_cache(len(prompts), tokens_BL.shape[1] + new_tokens - 1)
    conditioned, source_R = model, list(range(len(prompts)))
    answering = model.taps.answering(tokens_BL.shape[1])
    with working(model, pack=new_tokens >= WORTH_PACKING), answering, _covering(model, beam) as coverage:
        prefix_BL = prefix_of(model, tokens_BL, keep_BL)
        logits_RV = last_logits(model, tokens_BL, keep_BL, positions_of(keep_BL), kv_cache, prefix_BL)
        for count in range(1, new_tokens + 1):
            ids = [[*prompts[b], *one.tokens] for b, search in enumerate(searches) for one in search.running]
            log_probs_RV = _log_probs(logits_RV, ids, rules, beam, () if count > beam.min_tokens else stop_ids)
            likeliest = _likeliest(log_probs_RV, beam.beams + len(stop_ids))
            covered = coverage.after(conditioned, len(ids))
            rows_R: list[int] = []
            sources: list[int] = []
            row = 0
            for b, search in enumerate(searches):
                width = len(search.running)
                if width:
                    parents = search.advance(likeliest[row : row + width], covered[row : row + width])
                    rows_R += [row + parent for parent in parents]
                    sources += [b] * len(parents)
                row += width
            if not rows_R:
                break
            if rows_R != list(range(len(ids))):
                kept_R = torch.tensor(rows_R, device=model.device)
                kv_cache.select(kept_R)
                coverage.select(kept_R)
            if sources != source_R:
                conditioned, source_R = model.select(torch.tensor(sources, device=model.device)), sources
            newest = [[one.tokens[-1]] for search in searches for one in search.running]
            positions = None if keep_BL is None else [[len(prompts[b]) + count - 1] for b in sources]
            logits_RV = last_logits(
                conditioned,
                torch.tensor(newest, device=model.device),
                None,
                None if positions is None else torch.tensor(positions, device=model.device),
                kv_cache,
            )
    if stuck := [b for b, search in enumerate(searches) if not search.finished]:
        raise SettingsError(
            f"no_repeat_ngram = {beam.no_repeat_ngram} and min_tokens = {beam.min_tokens} forbid every way on from "
            f"prompt {stuck[0]}; allow repetition of longer n-grams, or shorter answers."
        )
    return [search.finished for search in searches]


def no_repeat_ngram(n: int) -> LogitsRule:
    """Forbids each token that would make an n-gram of the row's ids, prompt and answer, appear a second time."""

    def rule(logits_RV: Tensor, ids: Ids) -> Tensor:
        logits_RV = logits_RV.clone()
        for row, seen in zip(logits_RV, ids, strict=True):
            end = tuple(seen[len(seen) - n + 1 :])
            again = {seen[i + n - 1] for i in range(len(seen) - n + 1) if tuple(seen[i : i + n - 1]) == end}
            row[sorted(again)] = FORBIDDEN
        return logits_RV

    return rule


def _log_probs(
    logits_RV: Tensor, ids: Ids, rules: Sequence[LogitsRule], beam: Beam, forbidden: Collection[int]
) -> Tensor:
    """Rules change the distribution; what is forbidden afterwards leaves the rest as probable as it was, or a ban would
    raise the score of the hypotheses it hits."""
    logits_RV = apply(rules, logits_RV, ids)
    total_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    if not bool(total_R1.isfinite().all()):
        raise ModelFileError("the model's logits are not finite numbers; it is damaged.")
    log_probs_RV = logits_RV - total_R1
    if beam.no_repeat_ngram:
        log_probs_RV = no_repeat_ngram(beam.no_repeat_ngram)(log_probs_RV, ids)
    if forbidden:
        log_probs_RV[:, list(forbidden)] = FORBIDDEN
    return log_probs_RV


def _likeliest(log_probs_RV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of the best `count` tokens of each row and of those equal to the last of them (which of
    equals topk takes is not defined)."""
    least_R1 = log_probs_RV.topk(min(count, log_probs_RV.shape[-1]), dim=-1).values[:, -1:]
    found: list[list[tuple[int, float]]] = [[] for _ in log_probs_RV]
    at = ((log_probs_RV >= least_R1) & (log_probs_RV > FORBIDDEN)).nonzero(as_tuple=True)
    for row, token, log_prob in zip(*(one.tolist() for one in at), log_probs_RV[at].tolist(), strict=True):
        found[row].append((token, log_prob))
    return found


class _Coverage:
    """How much attention each word of the source has had from each running hypothesis."""

    def __init__(self, weight: float, site: str, seen: dict[str, Tensor]):
        self.weight, self.site, self.seen = weight, site, seen
        self.total_RS: Tensor | None = None

    def after(self, model: CausalLM, rows: int) -> list[float]:
        """The coverage of each row with the step just made."""
        if not self.weight:
            return [0.0] * rows
        probs = self.seen[self.site].float()
        probs_RS = (probs.mean(dim=1) if probs.ndim == 4 else probs)[:, -1]
        self.total_RS = probs_RS if self.total_RS is None else self.total_RS + probs_RS
        # A word nobody looked at has log 0; the smallest number there is keeps scores comparable.
        covered_RS = self.total_RS.clamp(torch.finfo(torch.float32).tiny, 1.0).log()
        keep_RS: Tensor | None = model.memory.keep_BS  # type: ignore[union-attr,assignment]
        if keep_RS is not None:
            covered_RS = covered_RS.masked_fill(~keep_RS, 0.0)
        totals: list[float] = (self.weight * covered_RS.sum(dim=-1)).tolist()
        return totals

    def select(self, rows_R: Tensor) -> None:
        if self.total_RS is not None:
            self.total_RS = self.total_RS[rows_R]


@contextmanager
def _covering(model: CausalLM, beam: Beam) -> Iterator[_Coverage]:
    """Watches the attention of the last layer to the source, if there is a coverage penalty."""
    if not beam.coverage_penalty:
        yield _Coverage(0.0, "", {})
        return
    whole = getattr(model, "whole", model)
    cross = [site for site in sites(whole) if site.endswith("cross.probs")]
    if not cross:
        raise SettingsError(
            f"coverage_penalty = {beam.coverage_penalty}, but a {model.config.model_type} model attends to no source; "
            f"leave it out."
        )
    with observe(whole, cross[-1]) as seen:
        yield _Coverage(beam.coverage_penalty, cross[-1], seen)

"""From logits to the next token: rules that reshape the distribution, and the two ways to choose from it.

    logits -> repetition, presence and frequency penalty -> temperature -> top-k -> top-p -> min-p -> greedy or sample

A rule is a function (logits_BV, ids so far) -> logits_BV; what it forbids becomes -inf. The order is that of
`transformers`, and it matters: top-p after a high temperature keeps more tokens than before it.
"""

# B batch, V vocabulary

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.core.settings import settings

Ids = Sequence[Sequence[int]]  # for each row of the batch, its prompt and what was generated
LogitsRule = Callable[[Tensor, Ids], Tensor]
Choose = Callable[[Tensor], Tensor]  # logits_BV -> tokens_B

FORBIDDEN = -math.inf


@settings
class Sampling:
    """How the next token is chosen. The defaults are greedy decoding."""

    temperature: float = 0.0  # 0: always the likeliest token; 1: as the model says; above: flatter
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together reach this probability
    min_p: float | None = None  # only tokens at least this fraction as likely as the likeliest
    repetition_penalty: float | None = None  # above 1: tokens of the prompt and the answer become less likely
    presence_penalty: float = 0.0  # above 0: tokens of the answer so far become less likely (OpenAI's; -2 to 2 there)
    frequency_penalty: float = 0.0  # the same, once for every time that the token came
    seed: int = 0  # seed of the draws

    def rules(self) -> list[LogitsRule]:
        """The rules that are switched on, in order, for one generation. Raises SettingsError for a value out of range.

        Greedy decoding needs only the penalties: the other rules never move the maximum, and are refused with
        temperature 0, where they would silently do nothing.
        """
        narrowing = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        if self.temperature == 0 and (given := [name for name, value in narrowing.items() if value is not None]):
            raise SettingsError(
                f"{given[0]} = {narrowing[given[0]]} does nothing at temperature 0, which always takes the likeliest "
                f"token; set a temperature (1.0 is the model's own distribution) or leave {given[0]} out."
            )
        rules = []
        if self.repetition_penalty is not None:
            rules.append(repetition_penalty(self.repetition_penalty))
        if self.presence_penalty or self.frequency_penalty:
            rules.append(answer_penalty(self.presence_penalty, self.frequency_penalty))
        if self.temperature != 0:
            rules.append(temperature(self.temperature))
        if self.top_k is not None:
            rules.append(top_k(self.top_k))
        if self.top_p is not None:
            rules.append(top_p(self.top_p))
        if self.min_p is not None:
            rules.append(min_p(self.min_p))
        return rules

    def choose(self) -> Choose:
        """Greedy at temperature 0, else draws of this seed, starting anew at each call."""
        return greedy if self.temperature == 0 else sample(self.seed)


def temperature(value: float) -> LogitsRule:
    """logits / T: below 1 sharpens (entropy falls), above 1 flattens. T > 0; T -> 0 is greedy."""
    _check("temperature", value, 0 < value < math.inf, "a number above 0 (0 itself means greedy)")
    return lambda logits_BV, ids: logits_BV / value


def top_k(k: int) -> LogitsRule:
    """Keep the k highest logits, and those equal to the k-th (Fan et al. 2018, arXiv 1805.04833)."""
    _check("top_k", k, k >= 1 and k == int(k), "a whole number from 1")

    def rule(logits_BV: Tensor, ids: Ids) -> Tensor:
        least_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        return logits_BV.masked_fill(logits_BV < least_B1, FORBIDDEN)

    return rule


def top_p(p: float) -> LogitsRule:
    """Keep the smallest set of likeliest tokens whose probability reaches p (nucleus sampling: Holtzman et al. 2019,
    arXiv 1904.09751). The likeliest token is always kept."""
    _check("top_p", p, 0 < p <= 1, "a probability above 0, up to 1")

    def rule(logits_BV: Tensor, ids: Ids) -> Tensor:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probs_BV = sorted_BV.softmax(dim=-1)
        likelier_BV = probs_BV.cumsum(dim=-1) - probs_BV  # probability of all tokens before this one
        drop_BV = likelier_BV >= p
        drop_BV[:, 0] = False
        return logits_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), FORBIDDEN)

    return rule


def min_p(fraction: float) -> LogitsRule:
    """Keep tokens with p >= fraction * max p (Nguyen et al. 2024, arXiv 2407.01082): the surer the model, the fewer."""
    _check("min_p", fraction, 0 <= fraction <= 1, "a fraction from 0 to 1")
    # p >= fraction * p_max  <=>  logit >= logit_max + log(fraction): no softmax is needed.
    margin = math.log(fraction) if fraction > 0 else FORBIDDEN
    return lambda logits_BV, ids: logits_BV.masked_fill(
        logits_BV < logits_BV.amax(dim=-1, keepdim=True) + margin, FORBIDDEN
    )


def repetition_penalty(penalty: float) -> LogitsRule:
    """Logits of tokens seen before are divided by the penalty when positive, multiplied when negative.

    Keskar et al. 2019 (CTRL, arXiv 1909.05858, section 4.1) divide always, which would favour a negative logit; this
    is the form everyone uses. Seen are the row's own ids only: `transformers` counts the padding of a batch as seen.
    """
    _check("repetition_penalty", penalty, 0 < penalty < math.inf, "a number above 0 (1 changes nothing)")

    def rule(logits_BV: Tensor, ids: Ids) -> Tensor:
        logits_BV = logits_BV.clone()
        for row, seen in zip(logits_BV, ids, strict=True):
            at = torch.tensor(sorted(set(seen)), dtype=torch.long, device=row.device)
            values = row[at]
            row[at] = torch.where(values < 0, values * penalty, values / penalty)
        return logits_BV

    return rule


def answer_penalty(presence: float, frequency: float) -> LogitsRule:
    """logit_j - c_j · frequency - [c_j > 0] · presence, c_j: how often the answer so far has token j (OpenAI's API
    reference, "frequency and presence penalties"). Below 0 the answer's tokens become likelier.

    The prompt does not count. The rule serves one generation: its first call has the prompts alone, and with every
    further one all rows have one token more.
    """
    for name, value in (("presence_penalty", presence), ("frequency_penalty", frequency)):
        _check(name, value, math.isfinite(value), "a finite number (0 changes nothing)")
    answered = itertools.count()

    def rule(logits_BV: Tensor, ids: Ids) -> Tensor:
        length = next(answered)
        logits_BV = logits_BV.clone()
        for row, seen in zip(logits_BV, ids, strict=True):
            counts = Counter(seen[len(seen) - length :])
            at = torch.tensor(list(counts), dtype=torch.long, device=row.device)
            row[at] -= presence + frequency * torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        return logits_BV

    return rule


def only_known(vocab_size: int) -> LogitsRule:
    """Only ids of the tokenizer: an unembedding may be padded to a round size; its last rows are no tokens."""

    def rule(logits_BV: Tensor, ids: Ids) -> Tensor:
        logits_BV = logits_BV.clone()
        logits_BV[:, vocab_size:] = FORBIDDEN
        return logits_BV

    return rule


def greedy(logits_BV: Tensor) -> Tensor:
    """The likeliest token; of equal ones the lowest id."""
    return logits_BV.argmax(dim=-1)


def sample(seed: int) -> Choose:
    """Draws from softmax(logits), row b by its own stream of random numbers, a function of (seed, b).

    So an answer depends neither on the other rows of the batch nor on the device nor on torch's global generator. The
    draw inverts the cumulative distribution in float64: the token at which it first exceeds a uniform number.
    """
    streams: list[random.Random] = []

    def choose(logits_BV: Tensor) -> Tensor:
        while len(streams) < len(logits_BV):
            streams.append(random.Random(f"{seed}/{len(streams)}"))
        uniform_B1 = torch.tensor([[stream.random()] for stream in streams[: len(logits_BV)]], dtype=torch.float64)
        cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
        # Rounding leaves the last sum a little off 1. A token of probability 0 adds nothing and is never the first.
        wanted_B1 = uniform_B1.to(logits_BV.device) * cumulative_BV[:, -1:]
        return torch.searchsorted(cumulative_BV, wanted_B1, right=True)[:, 0]

    return choose


def apply(rules: Sequence[LogitsRule], logits_BV: Tensor, ids: Ids) -> Tensor:
    """The rules one after the other, in float32."""
    logits_BV = logits_BV.float()
    for rule in rules:
        logits_BV = rule(logits_BV, ids)
    return logits_BV


def _check(name: str, value: float, allowed: bool, what: str) -> None:
    if not allowed:
        raise SettingsError(f"{name} = {value!r}; it must be {what}.")

"""Judged answers as batches, and what a frozen reference thinks of them: shared by the preference methods.

A pair is two sequences, prompt + chosen and prompt + rejected, of different lengths. Padded side by side, a fifth of
the work would go into padding; so the 2 P sequences of a batch are packed into as few rows as hold them, each seeing
only itself, and one forward pass scores them all. Packed and padded give the same numbers.

The reference π_ref never changes while training, so its log-probabilities can be computed once per pair, before the
first step (`remember`), instead of once per step: a forward pass, a third of the work, is saved in every epoch but one.
"""

# P pairs, S = 2 P sequences (the chosen ones, then the rejected ones), B rows, L tokens per row

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from bildung.core import ranks
from bildung.core.progress import progress
from bildung.data.batches import Batch, Example, PairExample, pack, pad_packed
from bildung.model.linear import deltas_off
from bildung.model.transformer import Decoder
from bildung.train.objectives import token_logprobs


@dataclass(frozen=True)
class AnswerBatch:
    """Sequences packed into rows. `sequence_BL` numbers them (0 at padding, which is never a target); `reference_S` are
    their log-probabilities under the reference when those were remembered."""

    batch: Batch
    sequence_BL: Tensor
    reference_S: Tensor | None = None

    def to(self, device: torch.device | str) -> AnswerBatch:
        reference_S = None if self.reference_S is None else self.reference_S.to(device)
        return AnswerBatch(self.batch.to(device), self.sequence_BL.to(device), reference_S)

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return self.batch.num_tokens

    @property
    def num_targets(self) -> int:
        return self.batch.num_targets


Reference = Callable[[Decoder, AnswerBatch], Tensor]  # (policy, answers) -> log π_ref of each sequence (S,)


@dataclass(frozen=True)
class _Numbered(Example):
    number: int = 0


def as_batch(sequences: Sequence[Example], pad_id: int | None, packed: bool = True) -> AnswerBatch:
    """The sequences in as few rows of the longest one's length as best-fit finds, or each in a row of its own.

    (The longest one's length and no more, because attention costs B L².)
    """
    numbered = [_Numbered(one.tokens, one.loss_mask, number) for number, one in enumerate(sequences)]
    rows = pack(numbered, max(map(len, sequences))) if packed else [[one] for one in numbered]
    batch = pad_packed(rows, pad_id)
    sequence_BL = torch.zeros_like(batch.tokens_BL)
    for b, row in enumerate(cast("list[list[_Numbered]]", rows)):
        numbers = [one.number for one in row for _ in one.tokens]
        sequence_BL[b, : len(numbers)] = torch.tensor(numbers)
    return AnswerBatch(batch, sequence_BL)


class Pairs:
    """Preference pairs, batched by their numbers: `pairs([3, 0])` holds pairs 3 and 0."""

    def __init__(self, examples: Sequence[PairExample], pad_id: int | None, packed: bool = True):
        self.examples, self.pad_id, self.packed = examples, pad_id, packed
        self.reference: dict[int, tuple[float, float]] = {}  # pair -> log π_ref of its chosen and rejected answer

    def __len__(self) -> int:
        return len(self.examples)

    def __call__(self, numbers: Sequence[int]) -> AnswerBatch:
        chosen = [self.examples[number].chosen for number in numbers]
        rejected = [self.examples[number].rejected for number in numbers]
        answers = as_batch([*chosen, *rejected], self.pad_id, self.packed)
        if not all(number in self.reference for number in numbers):
            return answers
        known = [self.reference[number][side] for side in (0, 1) for number in numbers]
        return replace(answers, reference_S=torch.tensor(known))

    def in_order(self, size: int) -> list[list[int]]:
        """The numbers of all pairs, `size` at a time."""
        return [list(range(len(self)))[start : start + size] for start in range(0, len(self), size)]

    def remember(
        self, model: Decoder, reference: Reference, batches: Iterable[Sequence[int]], file: Path | None = None
    ) -> None:
        """Store the reference's log-probabilities of every pair in `batches`, the first time it occurs.

        A pair is scored in the company it first trains in: the sums are then taken in the policy's own order, and the
        loss starts at log 2 to the last bit, in bfloat16 too. file: also kept there as they come, and what an earlier
        run left there is not computed again. Several ranks share the work, each with a file of its own.
        """
        own = None if file is None else file.with_name(f"{file.name}-{ranks.rank()}" if ranks.rank() else file.name)
        self._tell_each_other({} if own is None else _read_scores(own))
        known, work = set(self.reference), []
        for numbers in batches:
            if new := set(numbers) - known:
                work.append((numbers, new))
                known |= new
        mine, scores = work[ranks.rank() :: ranks.world_size()], dict[int, tuple[float, float]]()
        with progress("reference", sum(len(new) for _, new in mine)) as bar:
            for numbers, new in mine:
                answers = self(numbers).to(model.device)
                chosen, rejected = reference(model, answers).cpu().chunk(2)
                found = {n: (float(chosen[at]), float(rejected[at])) for at, n in enumerate(numbers) if n in new}
                scores |= found
                if own is not None:
                    with own.open("a", encoding="utf-8") as lines:
                        lines.writelines(json.dumps([number, *both]) + "\n" for number, both in found.items())
                bar.advance(len(new), tokens=answers.num_tokens)
        self._tell_each_other(scores)

    def _tell_each_other(self, scores: dict[int, tuple[float, float]]) -> None:
        for told in ranks.gathered(scores):
            self.reference |= told


def _read_scores(file: Path) -> dict[int, tuple[float, float]]:
    """Pair -> its two scores, as far as a killed run came; a line that was cut off is removed."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return {number: (chosen, rejected) for number, chosen, rejected in map(json.loads, whole.splitlines())}


def policy_logprobs(model: Decoder, answers: AnswerBatch) -> Tensor:
    """log π(y|x) of each sequence (S,): the sum over its answer's tokens."""
    return token_logprobs(model, answers.batch, answers.sequence_BL)


def without_delta(name: str) -> Reference:
    """The reference that is the policy's own weights with its new delta switched off: no second model in memory.

    Only the new one: with a source that is an adapter, its deltas stay on. (A reference that drops every adapter is the
    base model instead of the tuned one, a bug of several trainers: TRL #1193.)
    """

    def reference(model: Decoder, answers: AnswerBatch) -> Tensor:
        with torch.no_grad(), deltas_off(model, name):
            return policy_logprobs(model, answers)

    return reference


def frozen(other: Decoder) -> Reference:
    """The reference that is another model, or a copy of the policy from before."""

    def reference(model: Decoder, answers: AnswerBatch) -> Tensor:
        with torch.no_grad():
            return policy_logprobs(other, answers)

    return reference


def remembered(model: Decoder, answers: AnswerBatch) -> Tensor:
    """The reference whose numbers `Pairs.remember` has stored with the pairs."""
    if answers.reference_S is None:
        raise LookupError("a pair of this batch has no remembered reference; call Pairs.remember for these batches")
    return answers.reference_S

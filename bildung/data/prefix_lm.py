"""Prefix language modelling: a first part that is read whole, a rest that is written (Raffel et al. 2020, section 3.2).

    tokens   c a t </s> K AE T </s>          prefix: sees itself in both directions, and is not learned
    prefix   1 1 1 1    0 0  0 0             rest: sees the prefix and what was written before; each token is a target

One stack of blocks does what an encoder and a decoder do together. The prefix is a given source, or, of plain prose,
its beginning up to a random place, every place equally likely.
"""

# B rows, L length

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.data.batches import Batch, pad, pad_packed
from bildung.data.examples import NO_TARGET, Example, Examples, clm_examples
from bildung.data.seq2seq import SourceTarget, text_frame
from bildung.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class PrefixBatch:
    """A batch, and prefix_BL bool: True = a token of the prefix, which all tokens of its example see."""

    batch: Batch
    prefix_BL: Tensor

    def to(self, device: torch.device | str) -> PrefixBatch:
        """The same on another device."""
        return PrefixBatch(self.batch.to(device), self.prefix_BL.to(device))

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens

    @property
    def num_targets(self) -> int:
        return self.batch.num_targets


def prefix_examples(tokenizer: Tokenizer, documents: Iterable[str], max_length: int, seed: int) -> Examples[Example]:
    """Prose in pieces, each with a prefix of 1 to all but one of its tokens: a function of `seed` and its number."""
    examples: Examples[Example] = Examples()
    pieces = clm_examples(tokenizer, documents, max_length)
    for number, piece in enumerate(pieces):
        length = random.Random(f"prefix {seed} {number}").randint(1, len(piece) - 1)
        examples.append(Example(piece.tokens, [False] * length + [True] * (len(piece) - length)))
    examples.dropped, examples.notes = pieces.dropped, pieces.notes
    return examples


def source_prefix_examples(tokenizer: Tokenizer, texts: Iterable[SourceTarget], max_length: int) -> Examples[Example]:
    """Pairs of texts in one sequence: the source, with what stands around it, is the prefix; the target ends in EOS.
    One longer than `max_length` is cut at its end, and dropped when no target is left."""
    frame = text_frame(tokenizer)
    examples: Examples[Example] = Examples()
    for one in texts:
        source = frame.put(tokenizer.encode(one.source, bos=False)).tokens
        target = [*tokenizer.encode(one.target, bos=False), *frame.after]
        tokens = [*source, *target][:max_length]
        if len(tokens) <= len(source):
            examples.dropped[NO_TARGET] += 1
            continue
        examples.truncated += len(source) + len(target) > max_length
        examples.append(Example(tokens, [False] * len(source) + [True] * (len(tokens) - len(source))))
    return examples.close(texts, max_length)


def pad_prefix(
    rows: Sequence[Sequence[Example]], pad_id: int | None, *, packed: bool, multiple: int = 8
) -> PrefixBatch:
    """Rows of examples as a batch. The prefix of an example is what comes before its first target."""
    batch = pad_packed(rows, pad_id, multiple) if packed else pad([row[0] for row in rows], pad_id, multiple)
    return PrefixBatch(batch, prefix_of(batch))


def prefix_of(batch: Batch) -> Tensor:
    """prefix_BL: of each example, packed or not, the tokens before its first target."""
    targets_BL = batch.loss_mask_BL.long()
    so_far_BL = targets_BL.cumsum(dim=1)
    if batch.segments_BL is not None:  # how many targets there were before this example: a number that only grows
        starts_BL = F.pad(batch.segments_BL[:, 1:] != batch.segments_BL[:, :-1], (1, 0), value=True)
        so_far_BL = so_far_BL - ((so_far_BL - targets_BL) * starts_BL).cummax(dim=1).values
    return (so_far_BL == 0) & batch.keep_BL

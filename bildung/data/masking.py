"""Masked-language modelling: hide some tokens, ask for what stood there (Devlin et al. 2019, section 3.1, task 1).

    the   cat   sat   on   the   mat      15 % are chosen: cat, mat, ...
    the [MASK]  sat   on   the   dog      of these 80 % become [MASK], 10 % another token, 10 % stay as they are

Were they always [MASK], the model would learn nothing about tokens that it can see, which is all there is later. The
masks are drawn anew each time (RoBERTa's dynamic masking), as a function of (seed, number of the batch): a resumed run
sees the masks it would have seen. Special tokens are neither chosen nor put in (BERT draws replacements from the whole
vocabulary, special tokens too).
"""

# B rows, L tokens per row, V vocabulary

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bildung.core.errors import DataError, TokenizerError
from bildung.data.batches import Shuffled
from bildung.tokens.frames import Frame
from bildung.tokens.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Sentences:
    """One text, or two, with special tokens: ids, the segment of each, and what is asked of the pair, if anything."""

    tokens: list[int]
    types: list[int]
    label: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class MaskedBatch:
    """tokens_BL what the model sees; targets_BL what stood there; chosen_BL bool, True = to be predicted; keep_BL bool,
    False = padding; types_BL segment of a pair; labels_B of the pairs, or None; positions_BL and segments_BL where rows
    hold several texts, else None."""

    tokens_BL: Tensor
    targets_BL: Tensor
    chosen_BL: Tensor
    keep_BL: Tensor
    types_BL: Tensor
    labels_B: Tensor | None = None
    positions_BL: Tensor | None = None
    segments_BL: Tensor | None = None

    def to(self, device: torch.device | str) -> MaskedBatch:
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device) for name, tensor in vars(self).items()
        }
        return MaskedBatch(**moved)

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.keep_BL.sum())

    @property
    def num_targets(self) -> int:
        return int(self.chosen_BL.sum())


def pad_sentences(rows: Sequence[Sequence[Sentences]], pad_id: int | None, multiple: int = 8) -> MaskedBatch:
    """Rows of one text (or pair) each, or of several packed ones, padded on the right; nothing is masked yet."""
    longest = max(sum(len(one) for one in row) for row in rows)
    shape = (len(rows), -(-longest // multiple) * multiple)
    tokens_BL = torch.full(shape, pad_id or 0, dtype=torch.int64)
    types_BL, positions_BL, segments_BL = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for b, row in enumerate(rows):
        end = 0
        for number, one in enumerate(row, start=1):
            start, end = end, end + len(one)
            tokens_BL[b, start:end], types_BL[b, start:end] = torch.tensor(one.tokens), torch.tensor(one.types)
            positions_BL[b, start:end], segments_BL[b, start:end] = torch.arange(len(one)), number
    keep_BL, packed = segments_BL > 0, any(len(row) > 1 for row in rows)
    labels = [one.label for row in rows for one in row if one.label is not None]
    if labels and len(labels) != len(rows):
        raise DataError(f"{len(labels)} labels for {len(rows)} rows; a row has one pair, or no pair at all.")
    return MaskedBatch(
        tokens_BL,
        tokens_BL,
        torch.zeros(shape, dtype=torch.bool),
        keep_BL,
        types_BL,
        torch.tensor(labels) if labels else None,
        positions_BL if packed else None,
        segments_BL if packed else None,
    )


def pieces(documents: Iterable[Sequence[int]], frame: Frame, max_length: int) -> list[Sentences]:
    """Encoded documents cut into texts of at most `max_length` tokens with their special ones; nothing is left out."""
    room = max_length - frame.size(pair=False)
    if room < 1:
        raise DataError(f"max_length = {max_length} leaves no room beside the special tokens.")
    made = []
    for tokens in documents:
        for start in range(0, len(tokens), room):
            framed = frame.put(tokens[start : start + room])
            made.append(Sentences(framed.tokens, framed.types))
    return made


class Masker:
    """Chooses and hides tokens.

    share         of a row's tokens (special ones counted) that are chosen: max(1, round(share · length)), as in BERT
    masked        share of the chosen that become [MASK]; half of the others become a random token, half stay
    whole_words   all pieces of a word or none (BERT's later files); the share is then not exceeded, but may be missed
    """

    def __init__(self, tokenizer: Tokenizer, share: float = 0.15, masked: float = 0.8, whole_words: bool = False):
        if tokenizer.named["mask_token"] is None:
            raise TokenizerError("this tokenizer names no mask_token; masked-language modelling needs a [MASK].")
        self.mask_id, self.share, self.masked = tokenizer.id_of(tokenizer.named["mask_token"]), share, masked
        self.special_V = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        self.special_V[sorted(tokenizer.special_tokens.values())] = True
        known = torch.zeros_like(self.special_V)
        known[sorted(tokenizer.backend.get_vocab().values())] = True  # ids may have holes
        self.ordinary = (known & ~self.special_V).nonzero()[:, 0]
        self.continues_V = continuations(tokenizer) if whole_words else None

    def __call__(self, batch: MaskedBatch, generator: torch.Generator) -> MaskedBatch:
        """The batch with fresh masks."""
        tokens_BL = batch.targets_BL
        free_BL = batch.keep_BL & ~self.special_V[tokens_BL]
        wanted_B = (batch.keep_BL.sum(1).double() * self.share).round().clamp(min=1)
        score_BL = torch.rand(tokens_BL.shape, generator=generator)
        if self.continues_V is None:
            rank_BL = score_BL.masked_fill(~free_BL, 2.0).argsort(1).argsort(1)
            chosen_BL = free_BL & (rank_BL < wanted_B[:, None])
        else:
            chosen_BL = self._words(tokens_BL, free_BL, wanted_B, score_BL)
        fate_BL = torch.rand(tokens_BL.shape, generator=generator)
        drawn_BL = self.ordinary[torch.randint(len(self.ordinary), tokens_BL.shape, generator=generator)]
        hidden_BL = chosen_BL & (fate_BL < self.masked)
        swapped_BL = chosen_BL & ~hidden_BL & (fate_BL < self.masked + (1 - self.masked) / 2)
        seen_BL = tokens_BL.masked_fill(hidden_BL, self.mask_id).where(~swapped_BL, drawn_BL)
        return replace(batch, tokens_BL=seen_BL, chosen_BL=chosen_BL)

    def _words(self, tokens_BL: Tensor, free_BL: Tensor, wanted_B: Tensor, score_BL: Tensor) -> Tensor:
        """Whole words in random order, skipping those that would go beyond the number wanted; but at least one."""
        assert self.continues_V is not None
        inside_BL = self.continues_V[tokens_BL] & free_BL & free_BL.roll(1, 1)
        word_BL = (~inside_BL).cumsum(1)
        chosen_BL = torch.zeros_like(free_BL)
        for b in range(len(tokens_BL)):
            words: dict[int, list[int]] = {}
            for place in free_BL[b].nonzero()[:, 0].tolist():
                words.setdefault(int(word_BL[b, place]), []).append(place)
            left = int(wanted_B[b])
            for places in sorted(words.values(), key=lambda places: float(score_BL[b, places[0]])):
                if len(places) <= left or not chosen_BL[b].any():
                    chosen_BL[b, places] = True
                    left -= len(places)
        return chosen_BL


class DynamicMasks(Shuffled[T, MaskedBatch]):
    """Shuffled batches, each with masks of its own: batch n is a function of (seed, n)."""

    def __init__(
        self, items: Sequence[T], batch_size: int, seed: int, collate: Callable[[list[T]], MaskedBatch], masker: Masker
    ) -> None:
        super().__init__(items, batch_size, seed, collate)
        self.masker = masker

    def __call__(self, n: int) -> MaskedBatch:
        return self.masker(super().__call__(n), mask_generator(self.seed, n))


def mask_generator(seed: int | str, n: int) -> torch.Generator:
    """The randomness of batch n's masks."""
    return torch.Generator().manual_seed(random.Random(f"masks {seed} {n}").getrandbits(63))


def continuations(tokenizer: Tokenizer) -> Tensor:
    """bool V: whether a token goes on with the word before it, told by the vocabulary's own marks: ## (WordPiece)
    stands before what continues, Ġ (byte-level BPE) and ▁ (SentencePiece) before what begins. Raises TokenizerError
    without any."""
    vocabulary = tokenizer.backend.get_vocab()
    counts = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in ("##", "Ġ", "▁")}
    mark = max(counts, key=lambda mark: counts[mark])
    if not counts[mark]:
        raise TokenizerError("whole words cannot be told in this vocabulary: no token begins with ##, Ġ or ▁.")
    continues_V = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    for token, number in vocabulary.items():
        continues_V[number] = token.startswith(mark) == (mark == "##")
    return continues_V

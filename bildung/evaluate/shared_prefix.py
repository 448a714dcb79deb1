"""Scoring many questions that begin alike: the beginning is read once.

    demonstrations ............ | question 1 answer | question 2 answer | ...
    read once, kept as keys and   packed into one row; each sees the beginning and itself, at the positions
    values                        that would follow the beginning

With 32 demonstrations a prompt of 1,500 tokens ends in a question of 30: fifty times less to read. The numbers are
those of `likelihood.score` but for rounding.
"""

# L tokens of a packed row, D hidden size, B questions of a row

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bildung.data.examples import Example
from bildung.evaluate.likelihood import Score, evaluating, input_of, score, score_batch, share_prefixes
from bildung.model.transformer import Decoder

WORTH = 16  # tokens of a common beginning below which reading it again costs less than keeping it


def score_sharing(model: Decoder, examples: Sequence[Example], *, batch_tokens: int = 2048) -> list[Score]:
    """As `likelihood.score`, for examples that begin with the same tokens; by it, where that saves nothing."""
    shared = common_beginning(examples)
    if shared < WORTH or not _counts_positions(model):
        return score(model, examples, batch_tokens=batch_tokens)
    inputs = [input_of(example)[shared:] for example in examples]
    rows, row_of = share_prefixes(inputs)
    wanted: dict[int, list[int]] = {}
    for index, row in enumerate(row_of):
        wanted.setdefault(row, []).append(index)
    rests = [Example(example.tokens[shared:], example.loss_mask[shared:]) for example in examples]
    scores: dict[int, Score] = {}
    with evaluating(model):
        packs = _packs([len(row) for row in rows], batch_tokens)
        longest = max(sum(len(rows[row]) for row in pack) for pack in packs)
        cache = model.kv_cache(1, shared + longest)
        model.hidden(torch.tensor([examples[0].tokens[:shared]], device=model.device), kv_cache=cache)
        for pack in packs:
            h_BLD = _read(model, [rows[row] for row in pack], shared, cache)
            cache.length = shared  # what follows is written over
            served = [(b, index) for b, row in enumerate(pack) for index in wanted[row]]
            scores.update(score_batch(model, h_BLD, served, rests))
    return [scores[index] for index in range(len(examples))]


def _counts_positions(model: Decoder) -> bool:
    """Whether distances are those of positions. Windows and biases count columns, and rows share those here. And
    whether a beginning is read the same whatever follows it."""
    if not isinstance(model, Decoder) or model.prefix_lm:
        return False
    return model.model.bias is None and set(model.config.windows) == {None}


def common_beginning(examples: Sequence[Example]) -> int:
    """How many tokens all examples begin with, short of the one before the first target, which is read anew."""
    first = min(example.loss_mask.index(True) for example in examples)
    low, high = min(example.tokens for example in examples), max(example.tokens for example in examples)
    pairs = enumerate(zip(low, high, strict=False))  # what the first and the last in order share, all share
    differs = next((place for place, (a, b) in pairs if a != b), min(len(low), len(high)))
    return max(0, min(differs, first - 1))


def _packs(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Row numbers, as many in a pack as have `tokens` tokens in all (at least one)."""
    packs: list[list[int]] = []
    filled = tokens
    for row, length in enumerate(lengths):
        if filled + length > tokens:
            packs.append([])
            filled = 0
        packs[-1].append(row)
        filled += length
    return packs


def _read(model: Decoder, rows: Sequence[Sequence[int]], shared: int, cache: object) -> Tensor:
    """The final states of each row after the beginning, padded, BLD."""
    device, lengths = model.device, [len(row) for row in rows]
    segments = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(shared, shared + length) for length in lengths])
    h_1LD = model.hidden(
        torch.tensor([[token for row in rows for token in row]], device=device),
        positions_BL=positions[None].to(device),
        segments_BL=segments[None].to(device),
        kv_cache=cache,
    )
    return torch.nn.utils.rnn.pad_sequence(list(h_1LD[0].split(lengths)), batch_first=True)

"""The special tokens around a sentence, and between two, that an encoder was trained with.

    BERT       [CLS] a [SEP]        [CLS] a [SEP] b [SEP]          segment 0 up to the first [SEP], then 1
    RoBERTa    <s> a </s>           <s> a </s></s> b </s>          no segments: all 0

Which ones, is said by the post-processor of tokenizer.json. It is asked once and not run on texts: it would cut a pair
that is too long wherever the library pleases. A tokenizer without one gets BERT's frame from its [CLS] and [SEP].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bildung.core.errors import TokenizerError
from bildung.tokens.tokenizer import Tokenizer

Cut = Literal["end", "middle"]  # what goes of a text that is too long


class Framed(NamedTuple):
    """Token ids with their special tokens, and the segment, 0 or 1, of each."""

    tokens: list[int]
    types: list[int]


@dataclass(frozen=True)
class Frame:
    """What stands before, between and after; `second`: the segment that the second sentence and its end belong to."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    second: int

    def size(self, pair: bool) -> int:
        """How many special tokens there are."""
        return len(self.before) + len(self.after) + (len(self.between) if pair else 0)

    def put(self, first: Sequence[int], second: Sequence[int] | None = None) -> Framed:
        """One sentence or two in their frame."""
        if second is None:
            tokens = [*self.before, *first, *self.after]
            return Framed(tokens, [0] * len(tokens))
        head, tail = [*self.before, *first, *self.between], [*second, *self.after]
        return Framed(head + tail, [0] * len(head) + [self.second] * len(tail))


def frame_of(tokenizer: Tokenizer) -> Frame:
    """The tokenizer's frame. Raises TokenizerError when it has none and neither a [CLS] nor a [SEP] to make one of."""
    backend = tokenizer.backend
    if backend.post_processor is not None:
        one = backend.encode("a", add_special_tokens=False)
        single, pair = backend.post_process(one), backend.post_process(one, one)
        content = len(one.ids)
        start = single.special_tokens_mask.index(0)
        before, after = single.ids[:start], single.ids[start + content :]
        between = pair.ids[start + content : len(pair.ids) - len(after) - content]
        if before or after:
            return Frame(tuple(before), tuple(between), tuple(after), pair.type_ids[-1])
    cls, sep = tokenizer.named["cls_token"], tokenizer.named["sep_token"]
    if cls is None or sep is None:
        raise TokenizerError(
            "this tokenizer puts no special tokens around a sentence and names no cls_token and sep_token; an encoder "
            "needs them. Use the tokenizer that the encoder was trained with."
        )
    ends = (tokenizer.id_of(sep),)
    return Frame((tokenizer.id_of(cls),), ends, ends, 1)


def decoder_frame(tokenizer: Tokenizer) -> Frame:
    """What stands around a text for a decoder: BOS where the model uses one, a line break between two texts."""
    return Frame(tuple(tokenizer.encode("")), tuple(tokenizer.encode("\n", bos=False)), (), 0)


def encode_sentence(
    tokenizer: Tokenizer, frame: Frame, first: str, second: str | None, max_length: int, cut: Cut = "end"
) -> Framed:
    """One text, or two, framed and cut to `max_length` tokens in all: one text at its end, or in its middle, so that a
    quarter of what is left is from its beginning (128 of 510 tokens in Sun et al. 2019, arXiv 1905.05583); of two, the
    longer one token by token, so that a short one keeps all it says. Raises TokenizerError when the frame leaves no
    room."""
    a = tokenizer.encode(first, bos=False)
    b = None if second is None else tokenizer.encode(second, bos=False)
    room = max_length - frame.size(b is not None)
    if room < (1 if b is None else 2):
        raise TokenizerError(
            f"max_length = {max_length} leaves no room beside {frame.size(b is not None)} special tokens; raise it."
        )
    if b is None:
        head = room // 4
        return frame.put([*a[:head], *a[head - room :]] if cut == "middle" and len(a) > room else a[:room])
    kept_a, kept_b = shares(len(a), len(b), room)
    return frame.put(a[:kept_a], b[:kept_b])


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts stay when the longer one is shortened until both fit (BERT's truncate_seq_pair)."""
    if first + second <= room:
        return first, second
    half = room // 2
    if first <= half:
        return first, room - first
    if second <= half:
        return room - second, second
    return room - half, half

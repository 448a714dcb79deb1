"""T5's pretraining: spans of a text are cut out, and the target says what stood there (Raffel et al. 2020, arXiv
1910.10683, section 3.1.4).

    text     Thank you for inviting me to your party last week </s>
    source   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    target   <extra_id_0> for inviting <extra_id_1> last </s>

15 % of the tokens go, in spans of 3 on average. How many tokens and spans is not left to chance: of n tokens
round(0.15 n) go, in round(that / 3) spans; only the lengths are random, every way to divide being equally likely. The
spans alternate, beginning with a kept one and ending with a lost one (the authors' code; the figure in their paper has
one more sentinel at the target's end).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate

from bildung.core.errors import DataError, TokenizerError
from bildung.data.examples import Examples
from bildung.data.seq2seq import Seq2SeqExample, framed, pieces, text_frame
from bildung.tokens.frames import Frame
from bildung.tokens.tokenizer import Tokenizer

DENSITY, MEAN_SPAN = 0.15, 3.0
SENTINEL = "<extra_id_{}>"


def segments(items: int, parts: int, draws: random.Random) -> list[int]:
    """`items` divided into `parts` lengths of at least 1, every division equally likely."""
    borders = sorted(draws.sample(range(1, items), parts - 1))
    return [end - start for start, end in zip([0, *borders], [*borders, items], strict=True)]


def noise_spans(length: int, density: float, mean_span: float, draws: random.Random) -> list[tuple[int, int]]:
    """(start, end) of the spans that are lost from `length` tokens, at least 2."""
    lost = min(max(round(length * density), 1), length - 1)
    count = min(max(round(lost / mean_span), 1), length - lost)
    kept_lengths, lost_lengths = segments(length - lost, count, draws), segments(lost, count, draws)
    borders = list(accumulate(part for pair in zip(kept_lengths, lost_lengths, strict=True) for part in pair))
    return list(zip(borders[0::2], borders[1::2], strict=True))


def corrupt(
    tokens: Sequence[int], spans: Sequence[tuple[int, int]], sentinels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(source, target): each span replaced by its sentinel; each sentinel followed by its span."""
    source: list[int] = []
    target: list[int] = []
    end = 0
    for sentinel, (start, stop) in zip(sentinels, spans, strict=False):
        source += [*tokens[end:start], sentinel]
        target += [sentinel, *tokens[start:stop]]
        end = stop
    return [*source, *tokens[end:]], target


def lengths(max_length: int, density: float = DENSITY, mean_span: float = MEAN_SPAN) -> tuple[int, int]:
    """(how many tokens of text fill a source of `max_length`, the length of their target), EOS counted in both.

    A source of 512 takes 568 tokens, with a target of 114. Sources and targets then need no padding.
    """

    def sizes(text: int) -> tuple[int, int]:
        lost = round(text * density)
        count = round(lost / mean_span)
        return text - lost + count + 1, lost + count + 1

    text = max_length
    while sizes(text + 1)[0] <= max_length:
        text += 1
    return text, sizes(text)[1]


def sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1> ... Raises TokenizerError when the tokenizer has none."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    found: list[int] = []
    while (name := SENTINEL.format(len(found))) in vocabulary:
        found.append(vocabulary[name])
    if not found:
        raise TokenizerError(
            "this tokenizer has no sentinels <extra_id_0>, <extra_id_1> ... for the places of lost spans; train one "
            "with these special tokens (T5 has 100)."
        )
    return found


def span_examples(
    tokenizer: Tokenizer,
    documents: Iterable[str],
    start: int,
    max_length: int,
    seed: int,
    *,
    density: float = DENSITY,
    mean_span: float = MEAN_SPAN,
) -> Examples[Seq2SeqExample]:
    """Prose, cut into pieces that fill a source, each with its spans lost: a function of `seed` and the piece's
    number."""
    if not 0 < density < 1 or mean_span < 1:
        raise DataError(f"density = {density} must lie in (0, 1), mean_span = {mean_span} be at least 1.")
    sentinels, frame = sentinel_ids(tokenizer), text_frame(tokenizer)
    if (room := max_length - frame.size(pair=False)) < 4:
        raise DataError(f"max_length = {max_length} leaves no room for text and sentinels; raise it.")
    length, _ = lengths(room + 1, density, mean_span)
    examples: Examples[Seq2SeqExample] = Examples()
    for piece in pieces(tokenizer, documents, length, examples):
        draws = random.Random(f"spans {seed} {len(examples)}")
        spans = noise_spans(len(piece), density, mean_span, draws)
        if len(spans) > len(sentinels):
            raise TokenizerError(f"{len(spans)} spans need as many sentinels, and the tokenizer has {len(sentinels)}.")
        examples.append(_example(frame, *corrupt(piece, spans, sentinels), start))
    return examples.close(documents, max_length)


def _example(frame: Frame, source: list[int], target: list[int], start: int) -> Seq2SeqExample:
    whole = frame.size(pair=False)
    made, _ = framed(frame, source, target, start, len(source) + whole, len(target) + whole + 1)
    return made

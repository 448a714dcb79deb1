"""BART's pretraining: a damaged text is the source, the whole text the target (Lewis et al. 2019, arXiv 1910.13461).

    text     The cat sat. It was an old cat.
    source   It was <mask> cat. The <mask> cat sat.          sentences in another order; then
             a span of any length becomes one <mask>: "an old", and a span of length 0 before "cat"

Text infilling: about 30 % of the tokens lie in spans with lengths from a Poisson distribution (λ = 3), each replaced by
a single mask, so that the model must also guess how much is missing. The paper's other damages (deletion, rotation) did
not help and are not here. Sentences end with a full stop, as in the authors' code (in fairseq).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from bildung.core.errors import DataError, TokenizerError
from bildung.data.examples import Examples
from bildung.data.seq2seq import Seq2SeqExample, framed, pieces, text_frame
from bildung.tokens.tokenizer import Tokenizer

DENSITY, POISSON_MEAN = 0.3, 3.0


def poisson(mean: float, draws: random.Random) -> int:
    """A Poisson-distributed number (Knuth: how many uniform factors until the product falls below e^-mean)."""
    count, product = 0, draws.random()
    while product > math.exp(-mean):
        count, product = count + 1, product * draws.random()
    return count


def span_lengths(budget: int, mean: float, draws: random.Random) -> list[int]:
    """Poisson lengths, 0 among them, until together they reach `budget`; the last is cut to fit."""
    found: list[int] = []
    while (left := budget - sum(found)) > 0:
        found.append(min(poisson(mean, draws), left))
    return found


def infill(tokens: Sequence[int], mask_id: int, density: float, mean: float, draws: random.Random) -> list[int]:
    """`tokens` with spans replaced by one mask each; a span of length 0 puts a mask between two tokens.

    The spans are laid out in a random order with the kept tokens between them, every layout equally likely. At least
    one kept token stands between two spans, so that no two masks meet (fairseq draws starts that may overlap).
    """
    lost = span_lengths(round(len(tokens) * density), mean, draws)
    kept = len(tokens) - sum(lost)
    lost = lost[: kept + 1]  # so many gaps there are
    kept = len(tokens) - sum(lost)
    gaps = set(draws.sample(range(kept + 1), len(lost)))
    waiting = iter(lost)
    source: list[int] = []
    at = 0
    for gap in range(kept + 1):
        if gap in gaps:
            source.append(mask_id)
            at += next(waiting)
        if gap < kept:
            source.append(tokens[at])
            at += 1
    return source


def permute_sentences(tokens: Sequence[int], stops: frozenset[int], draws: random.Random) -> list[int]:
    """The sentences in a random order. One ends with the last of a run of `stops`; the text's end ends one too."""
    ends = [
        at + 1
        for at, token in enumerate(tokens)
        if token in stops and at + 1 < len(tokens) and tokens[at + 1] not in stops
    ]
    sentences = [list(tokens[start:end]) for start, end in zip([0, *ends], [*ends, len(tokens)], strict=True)]
    draws.shuffle(sentences)
    return [token for sentence in sentences for token in sentence]


def denoising_examples(
    tokenizer: Tokenizer,
    documents: Iterable[str],
    start: int,
    max_length: int,
    seed: int,
    *,
    density: float = DENSITY,
    mean_span: float = POISSON_MEAN,
    permute: bool = True,
) -> Examples[Seq2SeqExample]:
    """Prose in pieces of at most `max_length` tokens with what stands around them, damaged: a function of `seed` and
    the piece's number. Raises TokenizerError for a tokenizer without mask_token; DataError for a value out of range."""
    if not 0 < density < 1 or mean_span <= 0:
        raise DataError(f"density = {density} must lie in (0, 1), mean_span = {mean_span} be above 0.")
    name = tokenizer.named["mask_token"]
    if name is None:
        raise TokenizerError("this tokenizer names no mask_token, which stands for what is missing; train one with it.")
    mask_id, frame = tokenizer.id_of(name), text_frame(tokenizer)
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    stops = frozenset(number for token, number in vocabulary.items() if token.strip("Ġ▁#") in (".", "!", "?"))
    if (room := max_length - frame.size(pair=False)) < 2:
        raise DataError(f"max_length = {max_length} leaves no room for two tokens of text; raise it.")
    examples: Examples[Seq2SeqExample] = Examples()
    for piece in pieces(tokenizer, documents, room, examples):
        draws = random.Random(f"denoise {seed} {len(examples)}")
        damaged = permute_sentences(piece, stops, draws) if permute else piece
        source = infill(damaged, mask_id, density, mean_span, draws)
        # Masks of length 0 make a source longer than its text.
        made, _ = framed(frame, source, piece, start, len(source) + frame.size(pair=False), max_length + 1)
        examples.append(made)
    return examples.close(documents, max_length)

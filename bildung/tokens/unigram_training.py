"""How a Unigram vocabulary is learned: from far too many pieces down to few (Kudo 2018, section 3.2).

    1. seeds   every character, and every substring seen more than once with different things behind it
    2. EM      twice: how often is each piece used, over all segmentations weighted by their probability (E)?
               Its probability becomes that share (M). Pieces used less than half a time go
    3. prune   remove the quarter that is missed least, and go to 2 until 1.1 times the wanted size is left
    4. finish  cut to the size; characters always stay, so that every word can be spelled

What is missed is the loss: how much the likelihood of the corpus falls when a piece is removed and each of its uses
is spelled by the piece's second best segmentation ("the" by "t" + "he"). Pieces which that barely costs anything,
because they are rare or because their parts are cheap, are pruned.

This is SentencePiece's algorithm. The trainer of the `tokenizers` library (0.23) differs in two places, both of which
`as_tokenizers=True` repeats, and then comes from the same words to the same vocabulary:
- It looks for seeds in the list of distinct words, so that a word counts once however frequent it is, and a word that
  is no part of a longer one is never a seed. Its vocabularies cut text into 7 to 29 % more tokens (docs/log.md).
- Its loss counts all pieces of the vocabulary in the place of those that spell this one (its issue 2069).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bildung.core.errors import DataError, SettingsError
from bildung.tokens.unigram_lattice import Array, best_paths, expected_uses, groups, pieces_on

Words = Mapping[str, int]  # each distinct word and how often it occurs
LEAST_USE = 0.5  # expected uses below which the M step drops a piece
MOST_SEEDS = 1_000_000  # substrings


@dataclasses.dataclass(frozen=True)
class Removed:
    """A pruned piece: how often the best segmentations used it, what takes its place, and what that costs."""

    piece: str
    uses: int
    instead: tuple[str, ...]
    loss: float  # nats per word of the corpus; 0 when it was not used


@dataclasses.dataclass(frozen=True)
class Round:
    """EM and one pruning."""

    pieces: int  # at the start
    nats: tuple[float, ...]  # -log-likelihood per word before each EM step
    unused: tuple[str, ...]  # dropped by EM
    removed: tuple[Removed, ...]  # pruned; the unused, then those missed least
    kept: tuple[Removed, ...]  # could have been pruned; those missed least first


@dataclasses.dataclass(frozen=True)
class Training:
    """All rounds, and the vocabulary they end in, sorted by score."""

    rounds: tuple[Round, ...]
    scores: dict[str, float]


def learn(
    words: Words,
    size: int,
    *,
    shrink: float = 0.75,
    longest: int = 16,
    em_steps: int = 2,
    as_tokenizers: bool = False,
) -> Training:
    """A vocabulary of `size` pieces (the unknown token not counted) for `words`.

    shrink: share of the pieces that survives one pruning. longest: characters in a piece.
    as_tokenizers: with the two differences of that library.
    Raises DataError without words, SettingsError when `size` is below the number of different characters.
    """
    if not words:
        raise DataError("there are no words to learn from: the training text is empty")
    alphabet = sorted({character for word in words for character in word})
    if size < len(alphabet):
        raise SettingsError(f"{size} pieces are fewer than the {len(alphabet)} characters of the text; give more")
    first = seeds(words, longest, as_tokenizers)
    corpus = Corpus(words, list(first), longest)
    scores_V = np.array(list(first.values()))
    order = list(range(len(first)))  # the pieces that are left; `finished` cuts at the end
    target = (size + 1) * 11 // 10 - 1
    rounds = []
    while True:
        start, nats, unused = len(order), [], []
        for _ in range(em_steps):
            uses_V, loss = corpus.expected_uses(scores_V)
            nats.append(loss)
            unused += [corpus.pieces[number] for number in order if uses_V[number] < LEAST_USE]
            order = [number for number in order if uses_V[number] >= LEAST_USE]
            scores_V = maximized(uses_V, order)
        left = max(target, int((len(order) + 1) * shrink) - 1)
        pruned = Pruned([], [], order) if len(order) <= target else prune(corpus, scores_V, order, left, as_tokenizers)
        rounds.append(Round(start, tuple(nats), tuple(unused), tuple(pruned.removed), tuple(pruned.kept)))
        if len(order) <= target:
            scores = {corpus.pieces[number]: float(scores_V[number]) for number in order}
            return Training(tuple(rounds), finished(scores, alphabet, size))
        order = pruned.order
        scores_V = np.where(np.isin(np.arange(len(scores_V)), order), scores_V, -np.inf)


def seeds(words: Words, longest: int = 16, as_tokenizers: bool = False) -> dict[str, float]:
    """The pieces to start from, with scores: characters by frequency, substrings by occurrences times length.

    A substring counts when at least two different things stand behind it: characters, or the end of a word. Otherwise
    the longer substring says the same. (Behind a word seen twice stand two different words.)
    """
    characters: collections.Counter[str] = collections.Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    repeated: list[tuple[int, str]] = []
    frequent = {character for character in characters if characters[character] > 1}
    for length in range(2, longest + 1):
        times: collections.Counter[str] = collections.Counter()
        behind: dict[str, str | None] = {}  # what stands behind each substring; None: different things
        for word, count in words.items():
            seen = 1 if as_tokenizers else count
            for start in range(len(word) - length + 1):
                piece = word[start : start + length]
                if piece[:-1] in frequent and piece[1:] in frequent:  # what is seen twice has parts that are
                    after = word[start + length : start + length + 1]
                    times[piece] += seen
                    if (not after and seen > 1) or behind.setdefault(piece, after) != after:
                        behind[piece] = None
        frequent = {piece for piece, count in times.items() if count > 1}
        repeated += [(times[piece] * length, piece) for piece in frequent if behind[piece] is None]
    weights = sorted(((count, character) for character, count in characters.items()), reverse=True)
    weights += sorted(repeated, reverse=True)[:MOST_SEEDS]
    total = sum(weight for weight, _ in weights)
    return {piece: math.log(weight / total) for weight, piece in weights}


class Corpus:
    """The words and their counts, with all their substrings looked up among `pieces`; and the pieces as words."""

    def __init__(self, words: Words, pieces: list[str], longest: int) -> None:
        self.pieces = pieces
        numbers = {piece: number for number, piece in enumerate(pieces)}
        self.counts = np.array(list(words.values()), dtype=np.float64)
        self.groups = list(groups(list(words), numbers, longest))
        self.numbers, self.longest = numbers, longest

    def expected_uses(self, scores_V: Array) -> tuple[Array, float]:
        """E step: how often each piece is used over all segmentations of all words, each weighted by its probability,
        and the corpus's -log-likelihood in nats per word."""
        uses_V, nats = np.zeros(len(scores_V)), 0.0
        for group in self.groups:
            counts_W = self.counts[group.places_W]
            uses, log_z_W = expected_uses(group, scores_V, counts_W)
            uses_V += uses
            nats -= float(counts_W @ log_z_W)
        return uses_V, nats / float(self.counts.sum())

    def best_uses(self, scores_V: Array) -> Array:
        """How often each piece is used by the best segmentations; the last entry counts unknown characters."""
        uses = np.zeros(len(scores_V) + 1)
        for group in self.groups:
            numbers_WL = pieces_on(group, best_paths(group, scores_V)[0], scores_V)
            counts_WL = np.broadcast_to(self.counts[group.places_W][:, None], numbers_WL.shape)
            uses += np.bincount(numbers_WL.ravel(), counts_WL.ravel(), len(scores_V) + 2)[:-1]
        return uses

    def spellings(
        self, scores_V: Array, order: Sequence[int]
    ) -> Iterator[tuple[int, list[int], tuple[str, ...], bool]]:
        """Of every piece that others can spell: its number, the numbers and texts of the best such spelling, and
        whether the piece itself scores at least as much."""
        longer = [number for number in order if len(self.pieces[number]) > 1]
        texts = [self.pieces[number] for number in longer]
        for group in groups(texts, self.numbers, self.longest):
            lengths_WL, score_W = best_paths(group, scores_V, without_itself=True)
            numbers_WL = pieces_on(group, lengths_WL, scores_V)
            for place, lengths, parts, score in zip(group.places_W, lengths_WL, numbers_WL, score_W, strict=True):
                count = int(np.count_nonzero(lengths))
                ends = len(texts[place]) - np.cumsum(lengths[:count])
                pairs = zip(ends[::-1], lengths[:count][::-1], strict=True)
                spelled = tuple(texts[place][start : start + length] for start, length in pairs)
                own = longer[place]
                yield own, [int(part) for part in parts[:count]][::-1], spelled, bool(scores_V[own] >= score)


def maximized(uses_V: Array, order: Sequence[int]) -> Array:
    """M step: log-probabilities from the expected uses of the pieces in `order`, -inf for all others. The digamma
    function in the place of the logarithm is the mean under a Dirichlet prior, which takes more from rare pieces than
    from frequent ones (Liang & Klein 2007)."""
    scores_V = np.full(len(uses_V), -np.inf)
    total = digamma(float(uses_V[order].sum()))
    scores_V[order] = [digamma(float(count)) - total for count in uses_V[order]]
    return scores_V


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What one pruning decided."""

    removed: list[Removed]
    kept: list[Removed]
    order: list[int]  # what is left: first what cannot be pruned, then what is missed most


def prune(corpus: Corpus, scores_V: Array, order: list[int], left: int, as_tokenizers: bool = False) -> Pruned:
    """Chooses what to remove so that `left` pieces stay.

    Pieces that others cannot spell (characters) are no candidates and always stay; unused ones always go.
    """
    uses = corpus.best_uses(scores_V)
    total, total_words = float(uses.sum()), float(corpus.counts.sum())
    candidates: dict[int, Removed] = {}
    for number, parts, instead, whole in corpus.spellings(scores_V, order):
        count, loss = float(uses[number]), 0.0
        if count and not whole:
            continue
        if count:
            # Without the piece, each of its uses becomes one of every part, and all pieces together are used that much
            # more often.
            more = len(order) if as_tokenizers else len(parts) - 1
            grown = math.log(total + count * more)
            then = sum(math.log(uses[part] + count) - grown for part in parts)
            loss = count / total_words * (math.log(count / total) - then)
        candidates[number] = Removed(corpus.pieces[number], int(count), instead, loss)
    always = [number for number in order if number not in candidates]
    ranked = [number for number in order if number in candidates]
    ranked.sort(key=lambda number: (not candidates[number].uses, -candidates[number].loss))
    used = sum(bool(candidate.uses) for candidate in candidates.values())
    stay = min(max(0, left - len(always)), used)
    removed = [candidates[number] for number in reversed(ranked[stay:])]
    return Pruned(removed, [candidates[number] for number in reversed(ranked[:stay])], always + ranked[:stay])


def finished(scores: Mapping[str, float], alphabet: list[str], size: int) -> dict[str, float]:
    """The final vocabulary: every character, then pieces in their order (dearest first) until it is full."""
    lowest = min(scores.values())
    missing = [character for character in alphabet if character not in scores]
    final = {character: scores[character] for character in alphabet if character in scores}
    final |= {character: lowest + 1e-4 * place for place, character in enumerate(missing)}
    for piece, score in scores.items():
        if len(final) >= size:
            break
        final.setdefault(piece, score)
    return dict(sorted(final.items(), key=lambda item: -item[1]))


def digamma(x: float) -> float:
    """The derivative of log Γ, for x > 0: about log(x) - 1/(2x)."""
    shift = 0.0
    while x < 7:
        shift -= 1 / x
        x += 1
    x -= 0.5
    square = 1 / x**2
    return shift + math.log(x) + square / 24 - 7 * square**2 / 960 + 31 * square**3 / 8064 - 127 * square**4 / 30720

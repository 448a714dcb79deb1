"""How a Unigram vocabulary is learned: from far too many pieces down to few (Kudo 2018, section 3.2).

    1. seeds   every character, and every substring that is seen at least twice with different characters behind it
    2. EM      twice: how often is each piece used, over all segmentations weighted by their probability (E)?
               Its probability becomes that share (M). Pieces used less than half a time go
    3. prune   remove the quarter that is missed least, and go to 2 until 1.1 times the wanted size is left
    4. finish  cut to the size; characters always stay, so that every word can be spelled

What is missed is the loss: how much the likelihood of the corpus falls when a piece is removed and each of its uses
is spelled by the piece's second best segmentation ("the" by "t" + "he"). Pieces which that barely costs anything,
because they are rare or because their parts are cheap, are pruned.

This is SentencePiece's algorithm, written to be read and to show every step. The `tokenizers` library (0.23) differs in
one term of the loss, where it counts all pieces of the vocabulary in the place of those that spell this one (its issue
2069; SentencePiece had the same slip until 2023). With `alternatives="all"` this file does so too, and then comes from
the same words to the same vocabulary as the library, which is some ten times faster.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from bildung.core.errors import DataError, SettingsError
from bildung.tokens.unigram import Unigram

Words = Mapping[str, int]  # each distinct word and how often it occurs
LEAST_USE = 0.5  # expected uses below which the M step drops a piece


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
    alternatives: Literal["own", "all"] = "own",
) -> Training:
    """A vocabulary of `size` pieces (the unknown token not counted) for `words`.

    shrink: share of the pieces that survives one pruning. longest: characters in a piece.
    alternatives: what the loss counts: the pieces that spell this one, or (as `tokenizers` does) all there are.
    Raises DataError without words, SettingsError when `size` is below the number of different characters.
    """
    if not words:
        raise DataError("there are no words to learn from: the training text is empty")
    alphabet = sorted({character for word in words for character in word})
    if size < len(alphabet):
        raise SettingsError(f"{size} pieces are fewer than the {len(alphabet)} characters of the text; give more")
    scores, rounds = seeds(words, longest), []
    target = (size + 1) * 11 // 10 - 1
    while True:
        start, nats, unused = len(scores), [], []
        for _ in range(em_steps):
            uses, loss = expected_uses(scores, words)
            nats.append(loss)
            unused += [piece for piece in scores if uses[piece] < LEAST_USE]
            scores = maximized({piece: uses[piece] for piece in scores if uses[piece] >= LEAST_USE})
        left = max(target, int((len(scores) + 1) * shrink) - 1)
        removed, kept = ((), ()) if len(scores) <= target else prune(scores, words, left, alternatives)
        rounds.append(Round(start, tuple(nats), tuple(unused), removed, kept))
        if len(scores) <= target:
            return Training(tuple(rounds), finished(scores, alphabet, size))
        candidates = {candidate.piece for candidate in (*removed, *kept)}
        order = [piece for piece in scores if piece not in candidates]
        order += [candidate.piece for candidate in reversed(kept)]  # dearest first: `finished` cuts at the end
        scores = {piece: scores[piece] for piece in order}


def seeds(words: Words, longest: int = 16) -> dict[str, float]:
    """The pieces to start from, with scores: characters by frequency, substrings by occurrences times length.

    A substring counts when it is followed by at least two different things (a character, or the end of a word):
    otherwise the longer substring says the same. Occurrences are counted in distinct words.
    """
    characters: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    followers = collections.defaultdict(set)
    for word, count in words.items():
        for character in word:
            characters[character] += count
        for start in range(len(word)):
            for end in range(start + 2, min(start + longest, len(word)) + 1):
                times[word[start:end]] += 1
                followers[word[start:end]].add(word[end : end + 1])
    weights = sorted(((count, character) for character, count in characters.items()), reverse=True)
    repeated = [(count * len(piece), piece) for piece, count in times.items() if len(followers[piece]) > 1]
    weights += sorted(repeated, reverse=True)
    total = sum(weight for weight, _ in weights)
    return {piece: math.log(weight / total) for weight, piece in weights}


def expected_uses(scores: Mapping[str, float], words: Words) -> tuple[dict[str, float], float]:
    """E step: how often each piece is used, over all segmentations of all words, each weighted by its probability; and
    the corpus's -log-likelihood in nats per word.

    Forward-backward: the share of segmentations that use the piece from i to j is alpha(i) p(piece) beta(j) / Z.
    """
    model = Unigram(scores)
    uses = dict.fromkeys(scores, 0.0)
    loss, total = 0.0, sum(words.values())
    for word, count in words.items():
        length = len(word)
        edges = [
            (start, end, word[start:end], score)
            for start in range(length)
            for end in range(start + 1, min(start + model.longest, length) + 1)
            if (score := model.score(word[start:end])) is not None
        ]
        alpha, beta = [-math.inf] * (length + 1), [-math.inf] * (length + 1)
        alpha[0] = beta[length] = 0.0
        for start, end, _, score in edges:
            alpha[end] = log_add(alpha[end], alpha[start] + score)
        for start, end, _, score in reversed(edges):
            beta[start] = log_add(beta[start], score + beta[end])
        for start, end, piece, score in edges:
            if piece in uses:
                uses[piece] += count * math.exp(alpha[start] + score + beta[end] - alpha[length])
        loss -= count * alpha[length] / total
    return uses, loss


def maximized(uses: Mapping[str, float]) -> dict[str, float]:
    """M step: log-probabilities from expected uses. The digamma function in the place of the logarithm is the mean
    under a Dirichlet prior, which takes more from rare pieces than from frequent ones (Liang & Klein 2007)."""
    total = digamma(sum(uses.values()))
    return {piece: digamma(count) - total for piece, count in uses.items()}


def prune(
    scores: Mapping[str, float], words: Words, left: int, alternatives: Literal["own", "all"] = "own"
) -> tuple[tuple[Removed, ...], tuple[Removed, ...]]:
    """Chooses what to remove so that `left` pieces stay: (removed, kept candidates), both those missed least first.

    Pieces that cannot be spelled by others (characters) are no candidates and always stay; unused ones always go.
    """
    model = Unigram(scores)
    uses: collections.Counter[str] = collections.Counter()  # by the best segmentations
    for word, count in words.items():
        for piece in model.best(word, 1)[0].pieces:
            uses[piece] += count
    total, total_words = sum(uses.values()), sum(words.values())
    candidates = []
    for piece in scores:
        paths = model.best(piece)
        whole = paths[0].pieces == (piece,)
        if len(paths) == 1 or (not whole and uses[piece]):
            continue
        instead = paths[1].pieces if whole else paths[0].pieces
        loss = 0.0
        if uses[piece]:
            # Without the piece, each of its uses becomes one of every piece in `instead`, and all pieces together are
            # used that much more often.
            more = len(instead) - 1 if alternatives == "own" else len(scores)
            grown = math.log(total + uses[piece] * more)
            then = sum(math.log(uses[part] + uses[piece]) - grown for part in instead)
            loss = uses[piece] / total_words * (math.log(uses[piece] / total) - then)
        candidates.append(Removed(piece, uses[piece], instead, loss))
    room = max(0, left - (len(scores) - len(candidates)))
    candidates.sort(key=lambda candidate: (not candidate.uses, -candidate.loss))
    stay = min(room, sum(bool(candidate.uses) for candidate in candidates))
    return tuple(reversed(candidates[stay:])), tuple(reversed(candidates[:stay]))


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


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


def digamma(x: float) -> float:
    """The derivative of log Γ, for x > 0: about log(x) - 1/(2x)."""
    shift = 0.0
    while x < 7:
        shift -= 1 / x
        x += 1
    x -= 0.5
    square = 1 / x**2
    return shift + math.log(x) + square / 24 - 7 * square**2 / 960 + 31 * square**3 / 8064 - 127 * square**4 / 30720

"""Text changed a little, anew in every epoch, so that a model cannot learn the wording by heart.

    given      the old man sat by the sea
    drop       the old sat by sea                    words left out          (Wei & Zou 2019, EDA, arXiv 1901.11196)
    swap       the sea man sat by the old            two words change places                             (EDA)
    synonyms   the older man sat by the ocean        words from WordNet                                  (EDA)
    jostle     old the man by sat the sea            each a few places back or forth (Lample et al. 2018, 1711.00043)

Every change is a pure function of (seed, epoch, row): the same row is another text in the next epoch, and a resumed run
sees what the broken-off one would have seen. EDA was made for classification of few examples. A language model pays a
price, since it learns some broken grammar; `share` leaves the rest of the rows whole.

Round-trip translation ("back-translation") needs two translators and is not here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from bildung.core.errors import SettingsError
from bildung.core.settings import settings
from bildung.data.batches import Batch, Example, pad, pad_packed
from bildung.data.sources import rows
from bildung.tokens.tokenizer import Tokenizer

Synonyms = Mapping[str, Sequence[str]]
SHORTEST = 4  # letters of a word that is replaced: shorter ones are mostly grammar, and "as" is arsenic in WordNet


@settings
class Augmentation:
    """Changes of the text in training; all 0: none."""

    share: float = 0.5  # of the rows that are changed; the others stay as they are
    drop: float = 0.0  # share of words left out
    swap: float = 0.0  # swaps of two words, per word
    synonyms: float = 0.0  # share of words of four letters or more to replace, from nursery:wordnet
    jostle: int = 0  # places that a word may move back or forth

    def __post_init__(self) -> None:
        for name in ("share", "drop", "swap", "synonyms"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"augment.{name} = {getattr(self, name)} was given; it must be from 0 to 1.")
        if self.jostle < 0:
            raise SettingsError(f"augment.jostle = {self.jostle} was given; it must be at least 0.")

    @property
    def is_on(self) -> bool:
        """Whether any text is changed."""
        return self.share > 0 and bool(self.drop or self.swap or self.synonyms or self.jostle)


def augmented(text: str, given: Augmentation, seed: int, epoch: int, row: int, synonyms: Synonyms | None = None) -> str:
    """`text` as training sees it in this epoch. Space between words stays where it is; a row is never emptied."""
    chance = random.Random(f"augment {seed} {epoch} {row}")
    if chance.random() >= given.share:
        return text
    parts = re.split(r"(\S+)", text)  # space, word, space, word, ..., space
    words = parts[1::2]
    words = replace_synonyms(words, given.synonyms, synonyms or {}, chance)
    words = swap(words, given.swap, chance)
    words = jostle(words, given.jostle, chance)
    kept = drop(words, given.drop, chance)
    spaces = [space for space, word in zip(parts[::2], kept, strict=False) if word is not None]
    left = [word for word in kept if word is not None]
    return "".join(space + word for space, word in zip(spaces, left, strict=True)) + parts[-1]


def drop(words: Sequence[str], rate: float, chance: random.Random) -> list[str | None]:
    """None in the place of each word with probability `rate`; at least one word stays."""
    kept: list[str | None] = [None if chance.random() < rate else word for word in words]
    if words and not any(word is not None for word in kept):
        at = chance.randrange(len(words))
        kept[at] = words[at]
    return kept


def swap(words: Sequence[str], rate: float, chance: random.Random) -> list[str]:
    """About rate · (number of words) times, two random words change places."""
    swapped = list(words)
    for _ in range(sum(chance.random() < rate for _ in words)):
        a, b = chance.randrange(len(words)), chance.randrange(len(words))
        swapped[a], swapped[b] = swapped[b], swapped[a]
    return swapped


def jostle(words: Sequence[str], reach: int, chance: random.Random) -> list[str]:
    """A random order in which no word is more than `reach` places from where it was.

    Sorted by place + U[0, reach + 1): the order of Lample et al. 2018, section 2.3.
    """
    if not reach:
        return list(words)
    keys = [place + chance.random() * (reach + 1) for place in range(len(words))]
    return [words[place] for place in sorted(range(len(words)), key=keys.__getitem__)]


def replace_synonyms(words: Sequence[str], rate: float, synonyms: Synonyms, chance: random.Random) -> list[str]:
    """Words of four letters or more replaced with probability `rate`, where there is a synonym. Case and punctuation
    stay; only base forms are found ("sea", not "seas")."""

    def replaced(word: str) -> str:
        if not rate or chance.random() >= rate:
            return word
        found = re.fullmatch(r"(\W*)(\w+)(\W*)", word)
        if not found or len(found[2]) < SHORTEST or found[2].lower() not in synonyms:
            return word
        new = chance.choice(synonyms[found[2].lower()])
        return found[1] + (new.capitalize() if found[2][0].isupper() else new) + found[3]

    return [replaced(word) for word in words]


def wordnet_synonyms() -> dict[str, list[str]]:
    """Word -> synonyms, from nursery:wordnet. Raises DataError when it cannot be had."""
    return {row["word"]: row["synonyms"] for row in rows("nursery:wordnet")}


class Batches(Protocol):
    """Batch number -> batch, and how many make an epoch."""

    @property
    def batches_per_epoch(self) -> float: ...

    def __call__(self, n: int) -> Batch: ...


class AugmentedBatches:
    """`batch_at` with the text of its rows changed: decoded, changed, encoded again, cut to the row's length.

    For prose, in which every token but the first of a document is a target. Batch n is a function of n and the seed,
    because the order of the data is: n stands for (epoch, row).
    """

    def __init__(self, batch_at: Batches, tokenizer: Tokenizer, given: Augmentation, seed: int) -> None:
        self.batch_at, self.tokenizer, self.given, self.seed = batch_at, tokenizer, given, seed
        self.batches_per_epoch = batch_at.batches_per_epoch
        self.synonyms = wordnet_synonyms() if given.synonyms else {}
        self.special = {number for number in (tokenizer.bos_id, tokenizer.eos_id) if number is not None}

    def __call__(self, n: int) -> Batch:
        """Batch n, counted from 0."""
        batch = self.batch_at(n)
        changed = []
        for b, tokens in enumerate(batch.tokens_BL.tolist()):
            segments_BL = batch.keep_BL.long() if batch.segments_BL is None else batch.segments_BL
            pieces = _pieces(tokens, segments_BL[b].tolist())
            changed.append([self._changed(piece, n, b * 1000 + at) for at, piece in enumerate(pieces)])
        if batch.segments_BL is None:
            return pad([row[0] for row in changed], self.tokenizer.pad_id, multiple=1)
        return pad_packed(changed, self.tokenizer.pad_id, multiple=1)

    def _changed(self, tokens: list[int], n: int, row: int) -> Example:
        """One document's tokens: the first, which is no target, and a last end-of-text stay."""
        end = len(tokens) - (1 if len(tokens) > 2 and tokens[-1] in self.special else 0)
        text = self.tokenizer.decode(tokens[1:end])
        new = augmented(text, self.given, self.seed, n, row, self.synonyms)
        body = tokens[1:end] if new == text else self.tokenizer.encode(new, bos=False)[: end - 1]
        whole = [tokens[0], *body, *tokens[end:]]
        return Example(whole, [False] + [True] * (len(whole) - 1))


def _pieces(tokens: list[int], segments: list[int]) -> list[list[int]]:
    """The documents of a row; 0 is padding."""
    numbers = sorted(set(segments) - {0})
    return [[token for token, at in zip(tokens, segments, strict=True) if at == number] for number in numbers]

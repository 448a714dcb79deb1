"""The plan of operations that hold no model: what of the text, the logs or the records that they read they keep.

    tokenizer train     the different words and, for every pair of neighbours in them, where it stands
    data repeats        the different words, and how often each occurs
    pretrain tokenize   the tokenizer, and the tokens of one part
    look curves         the logs, and the picture
    report              the records, the logs, and the page

Different words are counted on a sample of about two million letters; how many there are in all of the text follows from
how many more a whole sample has than half of it (Heaps' law).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers

from bildung.app.chapters import find_directories
from bildung.core.errors import SettingsError
from bildung.core.record import RECORD
from bildung.data.text import documents
from bildung.data.token_files import PART_TOKENS
from bildung.look.curves import figure_size
from bildung.look.pages.picture import DPI
from bildung.tokenizer.corpus import Corpus
from bildung.tokenizer.learn import CUT
from bildung.tokenizer.learning import normalizer
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.history import METRICS

SAMPLE = 2_000_000  # letters
READING = 2_500_000  # bytes of readers, buffers and counts of letters
OF_PAIR = 135
"""Bytes of a merge learner for each pair of neighbours in a different word: the word's symbols, the places of the pair,
and those of the pairs that merges make. Measured (docs/log.md): 128 to 137, BERT's WordPiece 164."""
OF_WORD = 200  # bytes of a word as a key of a dictionary, with its count
OF_TOKEN = 44  # a Python integer, its place in a list, and its two copies in 16 bits
OF_ENTRY = 500
"""Bytes of a tokenizer for each token of its vocabulary, with its merges. Measured: 610 for SmolLM2's 49,152 in a new
process, 370 for the next one."""
OF_JSON = 6  # bytes of Python's objects for a byte of JSON


@dataclasses.dataclass(frozen=True)
class Sample:
    """Texts, evenly drawn from all. letters: of all."""

    texts: list[str]
    letters: int

    @property
    def share(self) -> float:
        """Of all letters, those of the sample."""
        return sum(map(len, self.texts)) / max(1, self.letters)

    def different(self, words_of: Callable[[str], Iterable[str]]) -> tuple[float, set[str]]:
        """(how many different words there are in all of the text, those of the sample)."""
        half: set[str] = set()
        for text in self.texts[::2]:
            half.update(words_of(text))
        found = set(half)
        for text in self.texts[1::2]:
            found.update(words_of(text))
        growth = math.log2(max(1.0, len(found) / max(1, len(half))))
        return len(found) * (1 / max(self.share, 1e-9)) ** min(1.0, growth), found


def sample(texts: Iterable[str]) -> Sample:
    """Every text up to twice SAMPLE letters; then every second of them, and so on."""
    kept: list[str] = []
    letters = held = 0
    every = 1
    for number, text in enumerate(texts):
        letters += len(text)
        if number % every:
            continue
        kept.append(text)
        held += len(text)
        if held > 2 * SAMPLE and len(kept) > 1:
            kept, every = kept[::2], 2 * every
            held = sum(map(len, kept))
    return Sample(kept, letters)


def learned(source: str, given: Any) -> dict[str, int]:
    """`tokenizer train`."""
    if given.algorithm == "unigram":
        raise SettingsError("what Unigram takes is not planned: it keeps all pieces of words that occur often enough.")
    _check_local(source, *given.also)
    if given.algorithm in ("word", "character", "byte"):
        return {"text": READING}
    cut = {
        "byte_bpe": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "bpe": pre_tokenizers.Split(Regex(CUT), "isolated"),
        "wordpiece": pre_tokenizers.BertPreTokenizer(),
    }[given.algorithm]
    normal = normalizer(given)

    def words_of(text: str) -> Iterable[str]:
        return (word for word, _ in cut.pre_tokenize_str(normal.normalize_str(text) if normal else text))

    count, found = sample(Corpus([source, *given.also], given.columns, given.limit).training).different(words_of)
    pairs = sum(len(word) - 1 for word in found) * count / max(1, len(found))
    return {"text": READING, "words, and where their pairs stand": int(OF_PAIR * pairs)}


def repeated(source: str, given: Any) -> dict[str, int]:
    """`data repeats`."""
    _check_local(source)
    count, _ = sample(documents(source)).different(
        lambda text: (word for word in text.lower().split() if word.isalpha())
    )
    return {"text": READING, "different words": int(OF_WORD * count)}


def encoded(source: str, given: Any) -> dict[str, int]:
    """`pretrain tokenize`."""
    _check_local(given.data)
    tokenizer = Tokenizer.load(Path(source))
    drawn = sample(documents(given.data, limit=given.limit))
    some = drawn.texts[:: max(1, len(drawn.texts) // 100)]
    per_letter = sum(len(tokenizer.encode(text)) for text in some) / max(1, sum(map(len, some)))
    longest = max(map(len, drawn.texts), default=0)
    tokens = min(drawn.letters, PART_TOKENS / max(per_letter, 1e-9) + longest) * per_letter
    return {"text": READING, "tokenizer": tokenizers_bytes([tokenizer]), "tokens of a part": int(OF_TOKEN * tokens)}


def drawn_curves(source: str, given: Any) -> dict[str, int]:
    """`look curves`."""
    places = [Path(source), *given.runs]
    width, height = figure_size(len(places))
    return {
        "logs": OF_JSON * _bytes(place / METRICS for place in places),
        "the picture": READING + int(4 * width * height * DPI**2),
    }


def told(source: str, given: Any) -> dict[str, int]:
    """`report`."""
    place = Path(source)
    directories = find_directories(
        given.life or ((place.parent if (place / RECORD).is_file() else place),), leave_out=[]
    )
    read = _bytes(directory / name for directory in directories for name in (RECORD, METRICS))
    return {"records and logs": OF_JSON * read, "the page": READING}


def tokenizers_bytes(tokenizers: Iterable[Any]) -> int:
    """Bytes of loaded tokenizers."""
    return OF_ENTRY * sum(one.vocab_size for one in tokenizers)


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def _check_local(*sources: str) -> None:
    if distant := [source for source in sources if source.startswith("hub:")]:
        raise SettingsError(f"{distant[0]} is read from the hub while it is needed: what that takes is not planned.")


READING_OPERATIONS: Mapping[str, Callable[[str, Any], dict[str, int]]] = {
    "tokenizer train": learned,
    "data repeats": repeated,
    "pretrain tokenize": encoded,
    "look curves": drawn_curves,
    "report": told,
}

"""Text encoded once, kept as numbers on disk, read without loading: what pretraining on much text draws from.

    tokens-00000.npy    the tokens of some documents, one after the other (uint16, or uint32 for large vocabularies)
    starts-00000.npy    where each document begins in it, and where the last one ends
    done.json           per part: documents, tokens, bytes of text, sha256; and the tokenizer's hash

A part is written whole or not at all, so a killed run goes on at the next part. A training row is a stretch of the
stream: nothing is padded and nothing is wasted. Where a document begins inside a row, a new segment begins, attention
stops, and the first token is no target.
"""

# L tokens of a row

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bildung.core.errors import DataError
from bildung.core.staging import to_disk
from bildung.data.examples import Example
from bildung.tokens.tokenizer import Tokenizer

DONE = "done.json"
PART_TOKENS = 2**22  # tokens of a part: 8 MB


def write_token_files(
    directory: Path, tokenizer: Tokenizer, documents: Iterable[str], *, part_tokens: int = PART_TOKENS
) -> dict[str, Any]:
    """Encode documents ([BOS] text [EOS]) into `directory`; goes on after the last whole part. Returns done.json.

    The same documents must come in the same order each time. Raises DataError for parts of another tokenizer, or when
    there is no text at all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    identity = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
    done = _read_done(directory) or {"tokenizer": identity, "dtype": np.dtype(dtype).name, "parts": []}
    if done["tokenizer"] != identity:
        raise DataError(f"{directory} holds tokens of another tokenizer; choose another place or remove it.")
    skip = sum(part["documents"] for part in done["parts"])
    tokens: list[int] = []
    starts, size = [0], 0
    for number, text in enumerate(documents):
        if number < skip:
            continue
        tokens += tokenizer.encode(text, bos=True)
        tokens += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        starts.append(len(tokens))
        size += len(text.encode())
        if len(tokens) >= part_tokens:
            _write_part(directory, done, np.array(tokens, dtype), np.array(starts, np.int64), size)
            tokens, starts, size = [], [0], 0
    if tokens:
        _write_part(directory, done, np.array(tokens, dtype), np.array(starts, np.int64), size)
    if not done["parts"]:
        raise DataError("there was no text to encode.")
    return done


def _write_part(
    directory: Path, done: dict[str, Any], tokens: NDArray[Any], starts: NDArray[np.int64], size: int
) -> None:
    number = len(done["parts"])
    for name, array in ((f"tokens-{number:05d}.npy", tokens), (f"starts-{number:05d}.npy", starts)):
        np.save(directory / name, array)
        to_disk(directory / name)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    done["parts"].append({"documents": len(starts) - 1, "tokens": len(tokens), "bytes": size, "sha256": digest})
    being_written = directory / f"{DONE}.new"
    being_written.write_text(json.dumps(done, indent=1), encoding="utf-8")
    to_disk(being_written)
    being_written.rename(directory / DONE)


def _read_done(directory: Path) -> dict[str, Any] | None:
    path = directory / DONE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; remove it to encode anew.") from error


class TokenRows(Sequence[list[Example]]):
    """The stream of a directory of token files cut into rows of L tokens, as a sequence: rows[n] reads only row n.

    A row shares its first token with the row before it (as that one's last target), so every token of a document but
    its first is a target exactly once. The rest at the end that fills no row is left out, and counted in `left_out`.
    """

    def __init__(self, directory: Path, length: int):
        done = _read_done(directory)
        if done is None:
            raise DataError(f"{directory} holds no {DONE}; make it with `bildung data tokenize`.")
        if length < 2:
            raise DataError(f"rows of {length} tokens: at least 2, one to read and one to predict.")
        self.directory, self.length, self.done = directory, length, done
        self._part_rows = [max((part["tokens"] - 1) // (length - 1), 0) for part in done["parts"]]
        self._first_row = [0, *accumulate(self._part_rows)]
        targets = sum(part["tokens"] - 1 for part in done["parts"])
        self.left_out = targets - len(self) * (length - 1)
        if not len(self):
            raise DataError(f"{directory} holds {targets} tokens, less than one row of {length}; use shorter rows.")

    def __len__(self) -> int:
        return self._first_row[-1]

    def __getitem__(self, number: int) -> list[Example]:  # type: ignore[override]
        """Row `number` as the pieces of documents in it, which see only themselves."""
        pieces = [piece.tolist() for piece in self.pieces(number)]
        return [Example(piece, [False] + [True] * (len(piece) - 1)) for piece in pieces]

    def pieces(self, number: int) -> list[NDArray[Any]]:
        """The tokens of these pieces, where they lie in the files: nothing is copied."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = bisect_right(self._first_row, number) - 1
        tokens, starts = self._maps[part]
        begin = (number - self._first_row[part]) * (self.length - 1)
        end = begin + self.length
        borders = starts[np.searchsorted(starts, begin, "right") : np.searchsorted(starts, end)]
        edges = [begin, *borders.tolist(), end]
        return [tokens[a:b] for a, b in pairwise(edges)]

    def __iter__(self) -> Iterator[list[Example]]:
        return (self[number] for number in range(len(self)))

    @property
    def tokens(self) -> int:
        """Tokens in all, documents' first ones included."""
        return sum(part["tokens"] for part in self.done["parts"])

    @cached_property
    def _maps(self) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Memory-mapped tokens and starts of every part."""
        found = []
        for number, part in enumerate(self.done["parts"]):
            try:
                tokens = np.load(self.directory / f"tokens-{number:05d}.npy", mmap_mode="r", allow_pickle=False)
                starts = np.load(self.directory / f"starts-{number:05d}.npy", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.directory}: part {number} cannot be read: {error}; encode it anew.") from error
            if len(tokens) != part["tokens"]:
                raise DataError(
                    f"{self.directory}: part {number} holds {len(tokens)} tokens, {DONE} says {part['tokens']}."
                )
            found.append((tokens, starts))
        return found

    def counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token is a target: everywhere but at the beginning of a document."""
        total = np.zeros(vocab_size, np.int64)
        for tokens, starts in self._maps:
            total += np.bincount(tokens, minlength=vocab_size)
            total -= np.bincount(tokens[starts[:-1]], minlength=vocab_size)
        return total

    def verify(self) -> None:
        """Read everything and compare with the hashes. Raises DataError naming the damaged part."""
        for number, (part, (tokens, _)) in enumerate(zip(self.done["parts"], self._maps, strict=True)):
            if hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest() != part["sha256"]:
                raise DataError(f"{self.directory}: the tokens of part {number} are damaged (sha256 differs).")

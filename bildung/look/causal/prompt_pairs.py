"""Pairs of prompts that differ in one thing: what causal analysis compares.

    {"clean":     "When Mary and John went to the store, John gave a drink to",     answers [" Mary"]
     "corrupted": "When Mary and John went to the store, Mary gave a drink to",     wrong   [" John"]
     "answers": [" Mary"], "wrong": [" John"], "places": {"IO": 1, "S2": 9}}

One JSON object per line. An activation of one prompt is put into the other at the same position, so both must have as
many tokens; answers are read off the logits after the last token, so each must be one token. A row that breaks this is
left out, counted and listed. `places` (optional) names positions by the index of their token: rows of different lengths
can then be averaged place by place.
"""

# B rows, L tokens

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bildung.core.errors import DataError, SettingsError
from bildung.data.sources import rows as read_rows
from bildung.look.asked import answer_number, asked
from bildung.look.prompt import encode_text
from bildung.model.store import LanguageModel
from bildung.tokens.tokenizer import Tokenizer

KEYS = {"clean", "corrupted", "answers", "wrong", "places"}


@dataclass(frozen=True)
class Pair:
    """One row, as token ids."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]
    places: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pairs:
    """The rows that can be used, and for each of the others why not."""

    rows: tuple[Pair, ...]
    dropped: tuple[str, ...] = ()

    def batches(self, size: int, device: torch.device | str = "cpu") -> list[PairBatch]:
        """Rows of one length together, so that nothing is padded and every position is real. Raises SettingsError."""
        if size < 1:
            raise SettingsError(f"batch_size = {size}; it is at least 1.")
        by_length: dict[int, list[Pair]] = defaultdict(list)
        for pair in self.rows:
            by_length[len(pair.clean)].append(pair)
        return [
            PairBatch(
                torch.tensor([pair.clean for pair in some], device=device),
                torch.tensor([pair.corrupted for pair in some], device=device),
                tuple(some),
            )
            for _, group in sorted(by_length.items())
            for some in (group[start : start + size] for start in range(0, len(group), size))
        ]

    def places(self) -> list[str]:
        """The names of positions that all rows have; without names, the indices that all rows have.

        Raises DataError where rows of different lengths name no place in common: their columns would mean nothing.
        """
        first = self.rows[0].places
        named = [name for name in first if all(name in pair.places for pair in self.rows)]
        if named:
            return sorted(named, key=lambda name: first[name])
        lengths = sorted({len(pair.clean) for pair in self.rows})
        if len(lengths) > 1:
            raise DataError(
                f"the prompts have {lengths[0]} to {lengths[-1]} tokens and no named places in common; give every row "
                '"places": {name: index of its token}, or look across heads instead of places.'
            )
        return [str(index) for index in range(lengths[0])]


@dataclass(frozen=True)
class PairBatch:
    """Rows of one length."""

    clean_BL: Tensor
    corrupted_BL: Tensor
    rows: tuple[Pair, ...]

    def at(self, place: str) -> Tensor:
        """The position B of a place in every row."""
        index = [pair.places[place] if place in pair.places else int(place) for pair in self.rows]
        return torch.tensor(index, device=self.clean_BL.device)


def read_pairs(source: str, reads: Tokenizer | LanguageModel, limit: int | None = None, max_tokens: int = 512) -> Pairs:
    """The pairs of a JSONL file (or any data source). Raises DataError if no row can be used, with the reasons."""
    return encode_pairs(list(read_rows(source, limit=limit)), reads, source, max_tokens)


def encode_pairs(
    rows: Sequence[Mapping[str, Any]], reads: Tokenizer | LanguageModel, source: str, max_tokens: int = 512
) -> Pairs:
    """Rows as token ids, as a decoder's tokenizer or as a model reads them; what cannot be used is named by its number,
    counted from 1. The answers of a classifier are its classes."""
    used, dropped = [], []
    for number, row in enumerate(rows, start=1):
        pair = _encode(row, reads, max_tokens)
        if isinstance(pair, Pair):
            used.append(pair)
        else:
            dropped.append(f"row {number}: {pair}")
    if not used:
        raise DataError(f"{source}: no pair can be used. " + "; ".join(dropped[:3]))
    return Pairs(tuple(used), tuple(dropped))


def _encode(row: Mapping[str, Any], reads: Tokenizer | LanguageModel, max_tokens: int) -> Pair | str:
    """The pair, or what is wrong with it."""
    tokenizer = reads if isinstance(reads, Tokenizer) else reads.tokenizer
    question = None if isinstance(reads, Tokenizer) else asked(reads)
    if missing := [key for key in ("clean", "corrupted", "answers") if not row.get(key)]:
        return f"has no {' and no '.join(missing)}"
    if unknown := sorted(set(row) - KEYS):
        return f"unknown key {unknown[0]}; there are {', '.join(sorted(KEYS))}"
    if wrong := _misshapen(row):
        return wrong
    prompts = row["clean"], row["corrupted"]
    clean, corrupted = (
        tuple(reads.encode(text) if isinstance(reads, Tokenizer) else encode_text(reads, text)[0]) for text in prompts
    )
    if len(clean) != len(corrupted):
        return f"clean has {len(clean)} tokens, corrupted {len(corrupted)}; position by position they must match"
    if len(clean) > max_tokens:
        return f"{len(clean)} tokens; at most {max_tokens} are looked at"
    found: dict[str, list[int]] = {"answers": [], "wrong": []}
    for key, ids in found.items():
        for text in row.get(key) or ():
            if question is not None and question.has_classes:
                try:
                    ids.append(answer_number(cast(LanguageModel, reads), question, text))
                except DataError as error:
                    return f"{key} {error}"
                continue
            tokens = tokenizer.encode(text, bos=False)
            if tokens == [tokenizer.unk_id]:
                return f"{key} {text!r} is not known to this tokenizer"
            if len(tokens) != 1:
                return f"{key} {text!r} is {len(tokens)} tokens; it must be one"
            ids += tokens
    places = dict(row.get("places") or {})
    if outside := [name for name, index in places.items() if not 0 <= index < len(clean)]:
        return f"place {outside[0]} = {places[outside[0]]} is outside of the {len(clean)} tokens"
    return Pair(clean, corrupted, tuple(found["answers"]), tuple(found["wrong"]), places)


def _misshapen(row: Mapping[str, Any]) -> str:
    """What of a row is not of the form that it should have, or nothing. A text where a list of texts should be is not
    taken for the list of its letters."""
    for key in ("clean", "corrupted"):
        if not isinstance(row[key], str):
            return f"{key} = {row[key]!r} is no text"
    for key in ("answers", "wrong"):
        if not (isinstance(texts := row.get(key) or [], list | tuple) and all(isinstance(one, str) for one in texts)):
            return f'{key} = {texts!r} is no list of texts, such as [" Paris"]'
    places = row.get("places") or {}
    if not (isinstance(places, Mapping) and all(type(index) is int for index in places.values())):
        return f'places = {places!r} gives no names the indices of tokens, such as {{"end": 4}}'
    return ""


def write_pairs(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

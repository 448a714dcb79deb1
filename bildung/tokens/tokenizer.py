"""Text to token ids and back: a `tokenizers.Tokenizer` plus what its tokenizer.json does not say.

The ids come from the `tokenizers` library. This class adds the decisions around it, where most chat and training bugs
live (doubled BOS, control tokens smuggled in by user text, a generation that never stops):

- BOS is put in front by `encode` itself and never twice; the post-processor of tokenizer.json is not run.
- Text is data: `<|im_end|>` inside a document is nine characters of prose unless the caller says `specials=True`.
- `stop_ids` are all the ids that end an answer: EOS, generation_config.json's list, and the template's end-of-turn.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from bildung.core.errors import ChatTemplateError, TokenizerError, nearest
from bildung.tokens.chat_template import end_of_turn
from bildung.tokens.files import (
    NAMED_TOKENS,
    find_clashes,
    read_json,
    read_template,
    token_text,
    without_special_merges,
    write_files,
)
from bildung.tokens.older_files import read_older_files


class Tokenizer:
    """One model's tokenizer.

    `config` is tokenizer_config.json, kept whole so that saving loses nothing; it names the special tokens.
    `more_stop_ids` are ids besides EOS that end an answer (generation_config.json's `eos_token_id` list).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        more_stop_ids: Sequence[int] = (),
    ):
        self.backend = backend
        self.config = dict(config or {})
        self.chat_template = chat_template
        self.more_stop_ids = tuple(more_stop_ids)
        self._lock = threading.Lock()  # guards the backend's `encode_special_tokens` switch
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        # One more than the largest id, which is what an embedding needs; ids may have holes.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.named = {name: token_text(self.config.get(name)) for name in NAMED_TOKENS}
        for name, token in self.named.items():
            if token is not None and token not in vocabulary:
                raise TokenizerError(
                    f"tokenizer_config.json says {name} = {token!r}, which is not in tokenizer.json "
                    f"({len(vocabulary)} tokens). {nearest(token, self.special_tokens)}".rstrip()
                )
        # Some files name an ordinary vocabulary entry as EOS; prose must not produce it either.
        ordinary = [token for token in self.named.values() if token is not None and token not in self.special_tokens]
        if ordinary:
            backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in ordinary])
            safe = without_special_merges(json.loads(backend.to_str()))
            self.backend = tokenizers.Tokenizer.from_str(json.dumps(safe))
            del self.special_tokens
        for number in self.more_stop_ids:
            if backend.id_to_token(number) is None:
                raise TokenizerError(f"generation_config.json: eos_token_id {number} is not a token of this tokenizer.")

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Reads tokenizer.json (or the files from before it: vocab.json and merges.txt, or vocab.txt; older_files.py),
        tokenizer_config.json, special_tokens_map.json, chat_template.jinja and the stop ids of generation_config.json;
        only the first must be there.

        Raises TokenizerError for a missing or corrupt file and for files that contradict each other.
        """
        directory = Path(directory)
        config = read_json(directory / "tokenizer_config.json", {})
        for name, value in read_json(directory / "special_tokens_map.json", {}).items():
            config.setdefault(name, value)
        raw: dict[str, Any] = {}
        path = directory / "tokenizer.json"
        if path.is_file():
            raw = read_json(path)
            safe = without_special_merges(raw)
            try:
                backend = tokenizers.Tokenizer.from_str(path.read_text("utf-8") if safe is raw else json.dumps(safe))
            except Exception as error:  # the library raises bare Exception for every malformed file
                raise TokenizerError(f"{path} is not a valid tokenizer: {error}") from error
        elif older := read_older_files(directory, config):
            backend, config = older
        else:
            raise TokenizerError(
                f"{directory} holds no tokenizer.json, and neither vocab.json with merges.txt nor vocab.txt. Save the "
                f"tokenizer in the `tokenizers` format."
            )
        if clashes := find_clashes(backend, raw, config):
            raise TokenizerError(f"{directory}: the tokenizer files contradict each other: {'; '.join(clashes[:5])}.")
        stops = read_json(directory / "generation_config.json", {}).get("eos_token_id") or []
        stops = stops if isinstance(stops, list) else [stops]
        if not all(isinstance(stop, int) and 0 <= stop < 2**32 for stop in stops):
            raise TokenizerError(
                f"{directory / 'generation_config.json'}: eos_token_id = {stops!r}; token ids expected."
            )
        return cls(backend, config, read_template(directory, config), stops)

    def save(self, directory: str | Path) -> None:
        """Writes the files that `load` and transformers.AutoTokenizer read."""
        write_files(Path(directory), self.backend, self.config, self.chat_template, self.more_stop_ids)

    # ── encoding ────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, text: str, *, bos: bool = True, specials: bool = False) -> list[int]:
        """Token ids of `text`.

        bos: put the BOS token in front when this model uses one, unless it is already there. EOS is never added:
            whether a text ends is known to the data, not to the tokenizer.
        specials: parse `<|im_end|>` and its like as control tokens. Only for text the program wrote itself. Added
            tokens that the tokenizer does not call special (`<think>` of Qwen3) are parsed either way, as in llama.cpp.

        Raises TokenizerError for text that is not Unicode (lone surrogates).
        """
        try:
            with self._lock:
                self.backend.encode_special_tokens = not specials
                ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # what the library makes of lone surrogates
            at = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
            what = f"a {type(text).__name__}" if at is None else f"not Unicode: a lone surrogate at character {at}"
            raise TokenizerError(f"the text to encode is {what}.") from None
        if not specials and not self.control_ids.isdisjoint(ids):
            found = sorted({self.token_of(i) for i in self.control_ids.intersection(ids)})
            raise TokenizerError(f"plain text was split into the control tokens {found}: the vocabulary is at fault.")
        if bos and self.uses_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)  # type: ignore[arg-type]
        return ids

    def encode_inside(self, text: str, *, after: int, specials: bool = False) -> list[int]:
        """Token ids of a piece from the middle of a text, where the token before is `after`: no BOS, and of the spaces
        that SentencePiece puts in front only the one that Llama 2's kind repeats after each control token. (Found by
        encoding the piece behind a control token or a newline and taking that off again.)"""
        if self.adds_space:
            context = self.token_of(after) if specials and after in self.control_ids else "\n"
            before = self.encode(context, bos=False, specials=specials)
            ids = self.encode(context + text, bos=False, specials=specials)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self.encode(text, bos=False, specials=specials)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises TokenizerError for an id without token."""
        ids = list(ids)
        for number in ids:
            if not 0 <= number < self.vocab_size:
                raise TokenizerError(f"{number} is not a token id; allowed: 0 to {self.vocab_size - 1}.")
        text: str = self.backend.decode(ids, skip_special_tokens=skip_special)
        return text

    def id_of(self, token: str) -> int:
        """The id of a token given as it stands in the vocabulary. Raises TokenizerError when there is none."""
        number: int | None = self.backend.token_to_id(token)
        if number is None:
            raise TokenizerError(f"{token!r} is not a token. {nearest(token, self.backend.get_vocab())}".rstrip())
        return number

    def token_of(self, number: int) -> str:
        """The vocabulary's string for an id, e.g. 'Ġthe'. Raises TokenizerError when there is none."""
        token: str | None = self.backend.id_to_token(number) if 0 <= number < self.vocab_size else None
        if token is None:
            raise TokenizerError(f"{number} is not a token id; allowed: 0 to {self.vocab_size - 1}.")
        return token

    # ── special tokens ──────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of every token marked special: control tokens that prose must never produce."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that plain text may never yield: the special tokens but the unknown token."""
        unknown = self.named["unk_token"]
        return frozenset(number for token, number in self.special_tokens.items() if token != unknown)

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches the text of any special token, the longest first."""
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def adds_space(self) -> bool:
        """Whether encoding puts a space in front of the text, as SentencePiece does: 'a' becomes '▁a'."""
        after_newline = self.encode("\na", bos=False)[len(self.encode("\n", bos=False)) :]
        return self.encode("a", bos=False) != after_newline

    def _named_id(self, name: str) -> int | None:
        token = self.named[name]
        return None if token is None else self.id_of(token)

    @cached_property
    def bos_id(self) -> int | None:
        """Beginning of sequence; None when the model has none."""
        return self._named_id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        """End of sequence; None when the model has none."""
        return self._named_id("eos_token")

    @cached_property
    def unk_id(self) -> int | None:
        """What stands for all that has no token of its own; None when the model has none."""
        return self._named_id("unk_token")

    @cached_property
    def pad_id(self) -> int | None:
        """Padding; None when the model has none. It may equal `eos_id`, so masks are never inferred from it."""
        return self._named_id("pad_token")

    @cached_property
    def uses_bos(self) -> bool:
        """Whether texts start with BOS. As in transformers 5, tokenizer.json's post-processor decides;
        tokenizer_config.json's `add_bos_token` only where there is none (GGUF conversions)."""
        if self.bos_id is None:
            return False
        if self.backend.post_processor is None:
            return bool(self.config.get("add_bos_token", False))
        return self.bos_id in self.backend.encode("", add_special_tokens=True).ids

    @cached_property
    def stop_ids(self) -> set[int]:
        """Ids that end an answer: EOS, generation_config.json's list, and the chat template's end-of-turn token."""
        stops = {*self.more_stop_ids, *([] if self.eos_id is None else [self.eos_id])}
        if self.chat_template is not None:
            try:
                turn = end_of_turn(self)
            except ChatTemplateError:
                turn = None  # a template that refuses a plain user-assistant pair says nothing about its turns
            stops |= set() if turn is None else {turn}
        return stops

    @property
    def template_hash(self) -> str | None:
        """The first 16 hex digits of the chat template's SHA-256: results are comparable only under equal templates."""
        if self.chat_template is None:
            return None
        return hashlib.sha256(self.chat_template.encode()).hexdigest()[:16]

    def check_fits(self, vocab_size: int) -> None:
        """Raises TokenizerError when this tokenizer has ids that an embedding of `vocab_size` rows lacks."""
        if self.vocab_size > vocab_size:
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} token ids, the model's embedding {vocab_size} rows: ids from "
                f"{vocab_size} on have no vector. Use the model's own tokenizer, or enlarge the embedding."
            )

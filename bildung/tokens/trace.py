"""How a text became tokens, step by step, by our own code: what `tokenizer trace` shows.

The normaliser and the cut into words are the tokenizer's own; then every word goes through bpe.py, wordpiece.py or
unigram.py, and the result must be what the `tokenizers` library makes of the text, or it is an error.

    tracer = Tracer(Tokenizer.load("lives/words"))
    for word in tracer("unaffable words"):
        print(word.text, word.tokens, word.steps)
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

from bildung.core.errors import TokenizerError
from bildung.tokens import bpe, wordpiece
from bildung.tokens.bpe import Merge
from bildung.tokens.tokenizer import Tokenizer
from bildung.tokens.unigram import Segmentation, Unigram
from bildung.tokens.wordpiece import Match

LONGEST_WORD = 2000  # characters; the steps are worked out one by one, in time that grows with the square


@dataclasses.dataclass(frozen=True)
class Word:
    """One word of a text; its steps are BPE's merges, WordPiece's matches, or Unigram's best two segmentations."""

    text: str  # as the algorithm sees it: normalised, in byte-level vocabularies one character per byte
    start: tuple[str, ...]  # the symbols that BPE starts from; empty otherwise
    steps: tuple[Merge, ...] | tuple[Match, ...] | tuple[Segmentation, ...]
    tokens: tuple[str, ...]
    ids: tuple[int, ...]


class Tracer:
    """Splits texts by the model inside a tokenizer, keeping every step.

    Raises TokenizerError for settings of the `tokenizers` library that are not understood here (dropout, prefixes).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.model: dict[str, Any] = json.loads(tokenizer.backend.to_str())["model"]
        self.algorithm: str = self.model["type"]
        splitters: dict[str, Callable[[], Callable[[str], Word]]] = {
            "BPE": self._bpe,
            "WordPiece": self._wordpiece,
            "Unigram": self._unigram,
            "WordLevel": self._word,
        }
        self.split = functools.lru_cache(maxsize=100_000)(splitters[self.algorithm]())

    def __call__(self, text: str) -> list[Word]:
        """The words of `text` in order. Raises TokenizerError for text that is not Unicode, or that contains tokens
        which were added to the vocabulary and are cut out before any algorithm sees them."""
        ids = self.tokenizer.encode(text, bos=False)
        words = [self.split(word) for word in self.words(text)]
        found = [number for word in words for number in word.ids]
        if found != ids:
            raise TokenizerError(
                f"the tokenizer makes other ids of this text ({ids[:20]}) than its {self.algorithm} ({found[:20]}): it "
                f"has added tokens in it ({', '.join(map(repr, self._added_in(text)[:5])) or 'none is known'}), which "
                f"are cut out first. Leave them out of the text."
            )
        return words

    def words(self, text: str) -> list[str]:
        """The pieces that the tokenizer cuts a text into before the algorithm looks at each alone."""
        backend = self.tokenizer.backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        cut = [text] if backend.pre_tokenizer is None else [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        for word in cut:
            if len(word) > LONGEST_WORD:
                raise TokenizerError(f"a word of {len(word)} characters is too long to trace; allowed: {LONGEST_WORD}")
        return [word for word in cut if word]

    def _added_in(self, text: str) -> list[str]:
        added = self.tokenizer.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.content in text]

    def _bpe(self) -> Callable[[str], Word]:
        model = self.model
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise TokenizerError(f"BPE with {name} = {model[name]!r} cannot be traced")
        vocabulary, unknown = model["vocab"], model["unk_token"]
        ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}

        def split(word: str) -> Word:
            if model["ignore_merges"] and word in vocabulary:  # Llama 3: a word that is a token needs no merges
                return self._done(word, [word], (), [word])
            start = bpe.symbols(
                word,
                vocabulary,
                unknown=unknown,
                byte_fallback=model["byte_fallback"],
                fuse_unknown=model["fuse_unk"],
            )
            steps = bpe.merge(start, ranks)
            return self._done(word, start, tuple(steps), steps[-1].pieces if steps else start)

        return split

    def _wordpiece(self) -> Callable[[str], Word]:
        model = self.model

        def split(word: str) -> Word:
            prefix, longest = model["continuing_subword_prefix"], model["max_input_chars_per_word"]
            found = wordpiece.matches(word, model["vocab"], prefix=prefix, longest=longest)
            return self._done(word, (), tuple(found), wordpiece.pieces(found, model["unk_token"]))

        return split

    def _unigram(self) -> Callable[[str], Word]:
        unknown = None if self.model["unk_id"] is None else self.model["vocab"][self.model["unk_id"]][0]
        model = Unigram(dict(self.model["vocab"]), unknown)

        def split(word: str) -> Word:
            paths = model.best(word)
            tokens: list[str] = []
            for piece in model.fused(paths[0]):
                spelled = bpe.bytes_of(piece) if self.model["byte_fallback"] else []
                known = bool(spelled) and all(byte in model.scores for byte in spelled)
                tokens += [piece] if piece in model.scores else spelled if known else [str(unknown)]
            return self._done(word, (), tuple(paths), tokens)

        return split

    def _word(self) -> Callable[[str], Word]:
        def split(word: str) -> Word:
            return self._done(word, (), (), [word if word in self.model["vocab"] else self.model["unk_token"]])

        return split

    def _done(self, word: str, start: Any, steps: Any, tokens: Any) -> Word:
        ids = tuple(self.tokenizer.id_of(token) for token in tokens)
        return Word(word, tuple(start), steps, tuple(tokens), ids)

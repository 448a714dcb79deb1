"""Learning a tokenizer from text: seven algorithms, one pipeline.

    text -> normalise -> cut into words -> pieces of each word -> ids            (and back: decoder)

    byte_bpe    words in GPT-2's cut, spaces in front; merges over 256 bytes: nothing is unknown (Radford et al. 2019)
    bpe         the same over characters, a space written as ▁ (Sennrich et al. 2016)
    unigram     likelihood decides, from many pieces down to few (Kudo 2018)
    wordpiece   BERT's cut at spaces and punctuation, greedy longest match (Schuster & Nakajima 2012)
    word        whatever stands between spaces: phonemes, toy tasks
    character   one token per character          byte   one token per byte, id = byte

The `tokenizers` library does the counting, in a way that gives the same tokenizer for the same text. (Left to itself
its WordPiece trainer numbers the ##letters in the order of a hash table, and ties then fall differently in every
process: its issue 1794.) Unigram is learned by tokens/unigram_training.py, because the library's trainer overlooks
frequent words and makes 7 to 29 % more tokens of the same text (docs/log.md).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from bildung.core.errors import DataError, SettingsError, TokenizerError
from bildung.tokenizer import special
from bildung.tokenizer.learning import DEFAULT_SIZE, Learning, check, needs_unknown, normalizer
from bildung.tokens.tokenizer import Tokenizer
from bildung.tokens.unigram_training import Training
from bildung.tokens.unigram_training import learn as learn_unigram

# GPT-2's cut with ▁ for the space, and with combining marks as part of their word (they are none in GPT-2's).
CUT = r"▁?[\p{L}\p{M}]+|▁?\p{N}+|▁?[^\s▁\p{L}\p{M}\p{N}]+|[▁\s]+(?![^▁\s])|[▁\s]+"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_NAMES = "<0x123456789ABCDEF>"  # the characters a byte's name is spelled with


@dataclasses.dataclass(frozen=True)
class Learned:
    """A tokenizer, and how it came to be."""

    tokenizer: Tokenizer
    characters: int  # different ones in the text, those left out not counted
    left_out: int
    training: Training | None  # every round, of Unigram


def learn(texts: Iterable[str], given: Learning) -> Learned:
    """A tokenizer learned from `texts` (iterated more than once).

    Raises DataError when there is no text, SettingsError for settings that do not fit together or a vocabulary size
    below the alphabet, TokenizerError for text that is not Unicode.
    """
    unknown_needed = needs_unknown(given)
    specials = special.usual(given.algorithm, unknown_needed) if given.specials is None else given.specials
    special.check(specials, given.control, unknown_needed)
    check(given, specials)
    learner = _Learner(given, specials, special.outside(specials, given.control, unknown_needed), unknown_needed)
    backend = learner.backend(texts)
    special.add(backend, specials, given.control, given.add_bos)
    config = {**special.named(specials), "clean_up_tokenization_spaces": False}
    return Learned(Tokenizer(backend, config), len(learner.characters), len(learner.left_out), learner.training)


class _Learner:
    """One run of one algorithm; `backend` does it."""

    def __init__(self, given: Learning, specials: dict[str, str], outside: list[str], unknown_needed: bool) -> None:
        self.given, self.outside = given, outside
        self.unknown = specials.get("unk") if unknown_needed else None
        self.normalizer = normalizer(given)
        self.pattern = re.compile("|".join(map(re.escape, sorted(outside, key=len, reverse=True))) or "(?!)")
        self.characters: Counter[str] = Counter()  # of the normalised text, those kept
        self.left_out: list[str] = []  # characters that get no token
        self.training: Training | None = None

    def backend(self, texts: Iterable[str]) -> tokenizers.Tokenizer:
        """The finished tokenizer, without its special tokens but the unknown one."""
        algorithm = self.given.algorithm
        if algorithm != "byte":
            self.count(texts)
        made = {
            "byte_bpe": self.byte_bpe,
            "bpe": self.bpe,
            "unigram": self.unigram,
            "wordpiece": self.wordpiece,
            "word": self.word,
            "character": self.character,
            "byte": self.byte,
        }[algorithm](self.texts(texts))
        if self.normalizer is not None:
            made.normalizer = self.normalizer
        return made

    def texts(self, texts: Iterable[str]) -> Iterator[str]:
        """Normalised, and cut where a special token or a character that is left out stands: neither is learned."""
        gaps = str.maketrans(dict.fromkeys(self.left_out, "\0"))
        for text in texts:
            for part in self.pattern.split(text):
                yield from (
                    (self.normalizer.normalize_str(part) if self.normalizer else part).translate(gaps).split("\0")
                )

    def count(self, texts: Iterable[str]) -> None:
        """Counts the characters, and drops those beyond `alphabet` or rarer than a character's min_frequency."""
        for number, text in enumerate(texts):
            for part in self.pattern.split(text):
                try:
                    self.characters.update(self.normalizer.normalize_str(part) if self.normalizer else part)
                    part.encode()
                except (TypeError, UnicodeEncodeError):
                    raise TokenizerError(f"text {number + 1} is not Unicode: it holds a lone surrogate") from None
        if self.given.algorithm in ("wordpiece", "word"):
            for space in [character for character in self.characters if character.isspace()]:
                del self.characters[space]
        if not self.characters:
            raise DataError("there is nothing to learn from: the training text is empty")
        least = (self.given.min_frequency or 1) if self.given.algorithm == "character" else 1
        ranked = sorted(self.characters, key=lambda character: (-self.characters[character], character))
        dropped = [character for character in ranked if self.characters[character] < least]
        dropped += ranked[self.given.alphabet : len(ranked) - len(dropped)] if self.given.alphabet else []
        for character in dropped:
            del self.characters[character]
        self.left_out = dropped

    def room(self, alphabet: int, what: str = "characters") -> int:
        """How many ids there are for the model's vocabulary, the unknown token and bytes not counted. Raises
        SettingsError when they are fewer than the alphabet."""
        size = self.given.vocab_size or DEFAULT_SIZE
        extra = len(self.outside) + (self.unknown is not None) + 256 * self.given.byte_fallback
        if size - extra < alphabet:
            others = "special tokens and bytes" if self.given.byte_fallback else "special tokens"
            also = f" and {extra} {others}" if extra else ""
            fewer = ", keep fewer characters with `alphabet`, merge some with `normalize`, or use byte_bpe, whose "
            fewer += "alphabet is 256 bytes"
            raise SettingsError(
                f"vocab_size = {size} is below the alphabet: the text has {alphabet} {what}{also}, so at least "
                f"{alphabet + extra} are needed. Raise it{'' if self.given.algorithm == 'byte_bpe' else fewer}."
            )
        return size - extra

    # ── the algorithms ──────────────────────────────────────────────────────────────────────────────────────────────

    def byte_bpe(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        size = self.room(len(alphabet), "bytes")
        made.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=size, min_frequency=self.pairs(), initial_alphabet=alphabet, show_progress=False
            ),
        )
        return made

    def byte(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        made = tokenizers.Tokenizer(models.BPE({character: byte for byte, character in _byte_alphabet().items()}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        return made

    def bpe(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Split(Regex(CUT), "isolated")
        size = self.room(len(self.characters))
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=self.pairs(),
            initial_alphabet=sorted(self.characters),
            show_progress=False,
        )
        trained.train_from_iterator(texts, trainer)
        model = json.loads(trained.to_str())["model"]
        merges = [(left, right) for left, right in model["merges"]]
        made = self.of_characters(sorted(model["vocab"], key=model["vocab"].get), merges, fuse_unknown=True)
        made.pre_tokenizer = trained.pre_tokenizer
        return made

    def character(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        return self.of_characters(sorted(self.characters), [], fuse_unknown=False)

    def of_characters(
        self, pieces: list[str], merges: list[tuple[str, str]], fuse_unknown: bool
    ) -> tokenizers.Tokenizer:
        """BPE over characters; without merges, every character is a token."""
        first = [self.unknown] if self.unknown else []
        first += BYTES if self.given.byte_fallback else []
        vocabulary = {piece: number for number, piece in enumerate([*first, *pieces])}
        made = tokenizers.Tokenizer(
            models.BPE(
                vocabulary,
                merges,
                unk_token=self.unknown,
                fuse_unk=fuse_unknown,
                byte_fallback=self.given.byte_fallback,
            )
        )
        made.decoder = self.decoder()
        return made

    def unigram(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        cut = pre_tokenizers.Split(Regex(CUT), "isolated")
        # A byte's name, "<0x41>", is a piece like any other, and would be found in text that says so, were the text's
        # characters not there and cheaper.
        extra = [c for c in BYTE_NAMES if c not in self.characters] if self.given.byte_fallback else []
        size = self.room(len(self.characters) + len(extra)) - len(extra)
        words = Counter(word for text in texts for word, _ in cut.pre_tokenize_str(text))
        self.training = learn_unigram(words, size)
        scores = self.training.scores
        least = min(scores.values())
        pieces = [(str(self.unknown), 0.0)]
        pieces += [(byte, 7 * least) for byte in BYTES] if self.given.byte_fallback else []
        pieces += [*scores.items(), *((character, least) for character in extra)]
        made = tokenizers.Tokenizer(models.Unigram(pieces, 0, self.given.byte_fallback))
        made.pre_tokenizer = cut
        made.decoder = self.decoder()
        return made

    def wordpiece(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        trained = tokenizers.Tokenizer(models.WordPiece(unk_token=self.unknown))
        trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        alphabet = sorted(self.characters)
        # Every letter both first in a word and inside one, and in this order: see the module's docstring.
        cut, normal = trained.pre_tokenizer.pre_tokenize_str, self.normalizer.normalize_str
        alone = {c for c in alphabet if cut(normal(f"a{c}"))[0][0] == "a"}  # punctuation, Chinese: never inside a word
        inside = [f"##{letter}" for letter in alphabet if letter not in alone]
        size = self.room(len(alphabet) + len(inside), "letters (a and ##a are two)")
        trainer = trainers.WordPieceTrainer(
            vocab_size=size + 1,
            min_frequency=self.pairs(),
            special_tokens=[str(self.unknown), *alphabet, *inside],
            show_progress=False,
        )
        trained.train_from_iterator(texts, trainer)
        model = json.loads(trained.to_str())["model"]
        made = tokenizers.Tokenizer(models.WordPiece(model["vocab"], unk_token=str(self.unknown)))
        made.pre_tokenizer = trained.pre_tokenizer
        made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        return made

    def word(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        made = tokenizers.Tokenizer(models.WordLevel(unk_token=str(self.unknown)))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        size = 2**31 if self.given.vocab_size is None else self.given.vocab_size - len(self.outside)
        if size < 2:
            raise SettingsError(f"vocab_size = {self.given.vocab_size} leaves no room for words beside special tokens")
        trainer = trainers.WordLevelTrainer(
            vocab_size=size,
            min_frequency=self.given.min_frequency or 1,
            special_tokens=[str(self.unknown)],
            show_progress=False,
        )
        made.train_from_iterator(texts, trainer)
        return made

    def pairs(self) -> int:
        return 2 if self.given.min_frequency is None else self.given.min_frequency

    def decoder(self) -> Any:
        steps: list[Any] = [decoders.Replace("▁", " ")] if self.given.algorithm != "character" else []
        steps += [decoders.ByteFallback()] if self.given.byte_fallback else []
        return decoders.Sequence([*steps, decoders.Fuse()])


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it has a shape, one from U+0100 on where it has none."""
    shapes = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in shapes}
    for place, byte in enumerate(byte for byte in range(256) if byte not in table):
        table[byte] = chr(256 + place)
    return table

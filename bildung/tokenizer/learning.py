"""What a tokenizer is to be: the settings that `tokenizer train` takes, and which of them fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tokenizers import normalizers

from bildung.core.errors import SettingsError
from bildung.core.settings import settings

Algorithm = Literal["byte_bpe", "bpe", "unigram", "wordpiece", "word", "character", "byte"]
Normal = Literal["nfc", "nfd", "nfkc", "nfkd", "lowercase", "strip_accents"]
DEFAULT_SIZE = 8192


@settings
class Learning:
    """What a tokenizer is to be."""

    algorithm: Algorithm = "byte_bpe"
    vocab_size: int | None = None  # token ids in all, special ones included; default: 8192, for word: all words
    # a pair seen less often is not merged (default: 2), a word or character seen less often not taken (default: 1)
    min_frequency: int | None = None
    alphabet: int | None = None  # keep only so many of the most frequent characters; the others become bytes or unknown
    byte_fallback: bool = False  # bpe, unigram, character: unknown characters become their UTF-8 bytes
    normalize: tuple[Normal, ...] = ()  # applied to every text, in this order
    specials: dict[str, str] | None = None  # role and token: bos <s> eos </s> ...; default: as usual for the algorithm
    control: tuple[str, ...] = ()  # further special tokens: "<|im_start|>" "<|im_end|>"
    add_bos: bool = False  # every text starts with BOS


def needs_unknown(given: Learning) -> bool:
    """Whether text can hold something without a token. (Unigram of the `tokenizers` library asks for an unknown token
    even where bytes stand in for it.)"""
    by_bytes = given.algorithm in ("byte_bpe", "byte") or (given.byte_fallback and given.algorithm != "unigram")
    return not by_bytes


def check(given: Learning, specials: Mapping[str, str]) -> None:
    """Raises SettingsError for settings that say nothing to the algorithm, or contradict each other."""
    if given.byte_fallback and given.algorithm not in ("bpe", "unigram", "character"):
        why = "has all bytes anyway" if given.algorithm in ("byte_bpe", "byte") else "knows no bytes"
        raise SettingsError(f"byte_fallback is for bpe, unigram and character; {given.algorithm} {why}")
    if given.alphabet is not None and given.algorithm in ("byte_bpe", "byte", "word"):
        raise SettingsError(f"alphabet is for tokenizers of characters; {given.algorithm} has none")
    if given.min_frequency is not None and given.algorithm in ("unigram", "byte"):
        raise SettingsError(f"{given.algorithm} does not choose its pieces by frequency: leave min_frequency out")
    if given.vocab_size is not None and given.algorithm in ("character", "byte"):
        how = "give `alphabet` to limit it" if given.algorithm == "character" else "leave vocab_size out"
        raise SettingsError(f"the vocabulary of a {given.algorithm} tokenizer is its alphabet; {how}")
    for name in ("vocab_size", "min_frequency", "alphabet"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise SettingsError(f"{name} = {value}; at least 1")
    if given.add_bos and "bos" not in specials:
        raise SettingsError("add_bos needs a token for the role bos in `specials`")
    if given.add_bos and {"cls", "sep"} <= specials.keys():
        raise SettingsError("texts start with cls here, as for BERT: leave add_bos out, or cls and sep")


def normalizer(given: Learning) -> Any:
    """The normaliser, None when there is nothing to do. Accents are marks of their own once a text is decomposed."""
    known: dict[str, list[Any]] = {
        "nfc": [normalizers.NFC()],
        "nfd": [normalizers.NFD()],
        "nfkc": [normalizers.NFKC()],
        "nfkd": [normalizers.NFKD()],
        "lowercase": [normalizers.Lowercase()],
        "strip_accents": [normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()],
    }
    steps = [step for name in given.normalize for step in known[name]]
    if given.algorithm == "wordpiece":  # BERT's: control characters out, spaces around Chinese characters
        steps.insert(0, normalizers.BertNormalizer(strip_accents=False, lowercase=False))
    if given.algorithm in ("bpe", "unigram"):
        steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps) if steps else None

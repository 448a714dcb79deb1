"""A tokenizer from the metadata of a GGUF file, which has no tokenizer.json.

GGUF names how text is cut before byte-pair encoding in `tokenizer.ggml.pre` and leaves the rule to the reader. The
rules here are those of the models' own tokenizer.json, which llama.cpp's expressions restate. transformers 5.23 knows
fewer names and cuts by GPT-2's rule otherwise: for `smollm` it does not split digits off, so that whitespace before a
number (`a  17`) gets other ids than the model was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from bildung.core.errors import TokenizerError, nearest
from bildung.tokens.tokenizer import Tokenizer

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
TEKKEN = (  # Mistral's: cuts at a lower-to-upper change, and has no contractions
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = r"\p{N}"

# `tokenizer.ggml.pre` -> the expressions that cut the text, one after the other.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (DIGITS, GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), (QWEN2,)),
    "tekken": (TEKKEN,),
}
# A piece that is a token as a whole is not built up from merges (Llama 3's and Mistral's tokenizer.json say so).
IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
# llama.cpp puts BOS in front for these when the file does not say.
BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
# Qwen's tokenizer composes Unicode first (NFC); llama.cpp leaves that out.
COMPOSES = ("qwen2", "deepseek-r1-qwen")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` and `tokenizer.chat_template` describe.

    Raises TokenizerError for an unknown model or pre-tokenizer and for metadata that contradicts itself.
    """
    model = _get(metadata, "model", str)
    tokens, kinds = _vocabulary(metadata)
    if model == "gpt2":
        backend, bos_default = _byte_level(metadata, tokens, kinds)
    elif model == "llama":
        tokens = _with_visible_spaces(metadata, tokens, kinds)
        backend, bos_default = _sentencepiece(metadata, tokens, kinds)
    else:
        raise TokenizerError(f"GGUF tokenizer model {model!r} is not supported; known: gpt2, llama.")
    added = [
        # Runs of spaces are found after the normalizer has made ▁ of them, all else in the text as it was given.
        AddedToken(token, special=kind == CONTROL, normalized=model == "llama" and set(token) == {"▁"})
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    ids = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        ids[name] = _get(metadata, f"{key}_token_id", int, None)
        if ids[name] is not None:
            config[f"{name}_token"] = _token(tokens, ids[name], key)
    add_bos = bool(_get(metadata, "add_bos_token", bool, bos_default)) and ids["bos"] is not None
    add_eos = bool(_get(metadata, "add_eos_token", bool, False)) and ids["eos"] is not None
    if add_bos or add_eos:
        # Written into tokenizer.json, so that every reader of the saved files does the same.
        used = [config["bos_token"]] * add_bos, [config["eos_token"]] * add_eos
        single = [*used[0], "$A", *used[1]]
        pair = [*single, *(f"{token}:1" for token in used[0]), "$B:1", *(f"{token}:1" for token in used[1])]
        special = {token: tokens.index(token) for token in used[0] + used[1]}
        backend.post_processor = processors.TemplateProcessing(single, pair, list(special.items()))
    config |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    stops = [_get(metadata, f"{key}_token_id", int, None) for key in ("eos", "eot", "eom")]
    known_stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"GGUF metadata tokenizer.chat_template is a {type(template).__name__}; text is needed.")
    return Tokenizer(backend, config, template, known_stops if len(known_stops) > 1 else [])


def _get(metadata: Mapping[str, Any], name: str, kind: type, *default: Any) -> Any:
    """`tokenizer.ggml.<name>`, of the right type."""
    value = metadata.get(f"tokenizer.ggml.{name}", *default)
    if value is None and default:
        return None
    if type(value) is not kind:
        raise TokenizerError(f"GGUF metadata tokenizer.ggml.{name} is {repr(value)[:60]}; a {kind.__name__} is needed.")
    return value


def _token(tokens: list[str], number: int, key: str) -> str:
    if not 0 <= number < len(tokens):
        raise TokenizerError(f"GGUF metadata: {key}_token_id is {number}; the vocabulary has {len(tokens)} tokens.")
    return tokens[number]


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens by id and their types."""
    tokens = _get(metadata, "tokens", list)
    kinds = _get(metadata, "token_type", list, [NORMAL] * len(tokens))
    if not tokens or not all(type(token) is str for token in tokens):
        raise TokenizerError("GGUF metadata: tokenizer.ggml.tokens must be a list of texts, and is not.")
    if len(kinds) != len(tokens):
        raise TokenizerError(f"GGUF metadata: {len(tokens)} tokens and {len(kinds)} token types; one each is needed.")
    if len(set(tokens)) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise TokenizerError(f"GGUF metadata: the token {twice!r} stands in the vocabulary twice.")
    return tokens, kinds


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    """GPT-2's byte-level BPE (Radford et al. 2019) with the merges of the file."""
    pre = _get(metadata, "pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"GGUF pre-tokenizer {pre!r} is not known, and guessing gives wrong ids; known: "
            f"{', '.join(PRE_TOKENIZERS)}. {nearest(pre, PRE_TOKENIZERS)}".rstrip()
        )
    ordinary = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (NORMAL, USER_DEFINED)}
    merges = []
    for merge in _get(metadata, "merges", list):
        left, space, right = str(merge).partition(" ")
        if not space or " " in right:
            raise TokenizerError(f"GGUF metadata: the merge {merge!r} is not two pieces with a space between.")
        if left + right in ordinary:  # never one that spells a control token
            merges.append((left, right))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in IGNORE_MERGES))
    except Exception as error:  # the library raises bare Exception, e.g. for a merge of pieces that are no tokens
        raise TokenizerError(f"GGUF metadata: the merges do not fit the vocabulary: {error}") from error
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in PRE_TOKENIZERS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    if pre in COMPOSES:
        backend.normalizer = normalizers.NFC()
    return backend, pre in BOS_BY_DEFAULT


def _with_visible_spaces(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> list[str]:
    """llama.cpp's converter writes spaces into user-defined pieces (Gemma's runs of 2 to 31) where SentencePiece has ▁;
    as ▁ they equal the model's own tokenizer.json. Llama 2's prefix space would come in front of each, and has none."""
    if _get(metadata, "add_space_prefix", bool, True):
        return tokens
    there = set(tokens)
    visible = [
        token.replace(" ", "▁") if kind == USER_DEFINED and set(token) == {" "} else token
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    return [old if new in there else new for old, new in zip(tokens, visible, strict=True)]


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """SentencePiece BPE (Kudo and Richardson 2018) with byte fallback. The file has scores and no merges: of all pairs
    the one whose joint piece scores highest is merged first."""
    scores = _get(metadata, "scores", list)
    if len(scores) != len(tokens):
        raise TokenizerError(f"GGUF metadata: {len(tokens)} tokens and {len(scores)} scores; one each is needed.")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind in (NORMAL, USER_DEFINED):
            cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
            known = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
            known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
            pairs += [(score, left, right) for left, right in known]
    pairs.sort(key=lambda p: (p[0], len(p[1]), len(p[2])), reverse=True)  # ties as in transformers' conversion
    unknown = _get(metadata, "unknown_token_id", int, None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, left, right in pairs],
            unk_token=None if unknown is None else _token(tokens, unknown, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space_first = bool(_get(metadata, "add_space_prefix", bool, True))
    prepend = [normalizers.Prepend("▁")] if space_first else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space_first else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(cast(list[Any], steps))
    return backend, True

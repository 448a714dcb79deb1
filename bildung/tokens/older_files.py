"""Tokenizers from before tokenizer.json: GPT-2's and RoBERTa's vocab.json + merges.txt, and BERT's vocab.txt.

These files hold the vocabulary only. How text is cut, and which tokens are special, stood in the code of each model and
is written down here; a word in tokenizer_config.json overrides it. `Tokenizer.save` writes a tokenizer.json.

    vocab.json    {"Ġthe": 262, ...}         merges.txt   one pair per line, in the order they were learned
    vocab.txt     one piece per line; its id is the number of its line
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from bildung.core.errors import TokenizerError
from bildung.tokens.files import NAMED_TOKENS, read_json, token_text

GPT2_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}
BERT_TOKENS = {
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
BYTE_LEVEL = {"GPT2": GPT2_TOKENS, "Roberta": ROBERTA_TOKENS, "Bart": ROBERTA_TOKENS}  # by tokenizer_class
WORDPIECE = ("Bert", "DistilBert", "Electra", "MobileBert")


def read_older_files(directory: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]] | None:
    """The tokenizer of `directory`, and its config with the model's usual special tokens; None when neither kind of
    file is there. Raises TokenizerError when a file is broken, or contradicts itself or the other."""
    kind = str(config.get("tokenizer_class") or read_json(directory / "config.json", {}).get("model_type") or "")
    kind = kind.removesuffix("Fast").removesuffix("Tokenizer").lower()
    if (directory / "merges.txt").is_file():
        return _byte_level(directory, config, kind)
    if (directory / "vocab.txt").is_file():
        return _wordpiece(directory, config, kind)
    return None


def _byte_level(directory: Path, given: Mapping[str, Any], kind: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    usual = {name.lower(): tokens for name, tokens in BYTE_LEVEL.items()}
    if kind not in ("", *usual):
        raise TokenizerError(
            f"{directory}: how {kind!r} cuts text is not known without a tokenizer.json; "
            f"known with vocab.json and merges.txt: {', '.join(BYTE_LEVEL)}."
        )
    vocabulary = read_json(directory / "vocab.json")
    if wrong := [token for token, number in vocabulary.items() if type(number) is not int]:
        raise TokenizerError(f"{directory / 'vocab.json'}: the id of {wrong[0]!r} is {vocabulary[wrong[0]]!r}.")
    by_id = {number: token for token, number in vocabulary.items()}
    if len(by_id) < len(vocabulary):
        token = next(token for token, number in vocabulary.items() if by_id[number] != token)
        raise TokenizerError(
            f"{directory / 'vocab.json'} gives the id {vocabulary[token]} to {token!r} and to "
            f"{by_id[vocabulary[token]]!r}."
        )
    merges = []
    lines = _lines(directory / "merges.txt")
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise TokenizerError(
                f"{directory / 'merges.txt'}:{number}: {line!r} is not two pieces with a space between."
            )
        if unknown := next((piece for piece in (left, right, left + right) if piece not in vocabulary), None):
            raise TokenizerError(
                f"{directory / 'merges.txt'}:{number} merges {left!r} and {right!r}, and {unknown!r} is not in "
                f"vocab.json: the two files do not belong together."
            )
        if left.endswith("</w>") or right.endswith("</w>"):
            raise TokenizerError(f"{directory}: pieces that end in </w> (CLIP, GPT-1) need a tokenizer.json.")
        merges.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    prefix_space = bool(given.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    config = {**usual.get(kind, GPT2_TOKENS), **given}
    _add_special(backend, config, directory)
    if usual.get(kind) is ROBERTA_TOKENS:
        ends = [str(token_text(config[name])) for name in ("sep_token", "cls_token")]
        sep, cls = ((token, backend.token_to_id(token) or 0) for token in ends)
        backend.post_processor = processors.RobertaProcessing(sep, cls, True, prefix_space)
    return backend, config


def _wordpiece(directory: Path, given: Mapping[str, Any], kind: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    if kind not in ("", *(name.lower() for name in WORDPIECE)):
        raise TokenizerError(
            f"{directory}: how {kind!r} cuts text is not known without a tokenizer.json; "
            f"known with vocab.txt: {', '.join(WORDPIECE)}."
        )
    pieces = _lines(directory / "vocab.txt")
    vocabulary: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if piece in vocabulary:
            raise TokenizerError(
                f"{directory / 'vocab.txt'} has {piece!r} in line {vocabulary[piece] + 1} and again in line "
                f"{number + 1}; a piece has one id."
            )
        vocabulary[piece] = number
    config = {**BERT_TOKENS, **given}
    unknown = str(token_text(config["unk_token"]))
    if unknown not in vocabulary:
        raise TokenizerError(
            f"{directory / 'vocab.txt'} has no line {unknown!r}, the unknown token, which WordPiece cannot do without."
        )
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),  # none: as `lowercase`
        lowercase=bool(config.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    _add_special(backend, config, directory)
    ends = [token_text(config[name]) for name in ("cls_token", "sep_token")]
    if all(ends):
        cls, sep = ends
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(str(token), backend.token_to_id(str(token))) for token in ends],
        )
    return backend, config


def _add_special(backend: tokenizers.Tokenizer, config: Mapping[str, Any], directory: Path) -> None:
    """Marks the named tokens as special, and adds those of added_tokens.json ({token: id}) at their ids."""
    added = read_json(directory / "added_tokens.json", {})
    for text, number in sorted(added.items(), key=lambda item: item[1]):
        backend.add_tokens([AddedToken(text, normalized=False)])
        if backend.token_to_id(text) != number:
            raise TokenizerError(
                f"{directory / 'added_tokens.json'} puts {text!r} at id {number}; after the vocabulary it comes at "
                f"{backend.token_to_id(text)}."
            )
    named = dict.fromkeys(token for name in NAMED_TOKENS if (token := token_text(config.get(name))) is not None)
    if missing := [token for token in named if backend.token_to_id(token) is None]:
        raise TokenizerError(
            f"{directory}: the special token {missing[0]!r} is not in the vocabulary. Name the right one in "
            f"tokenizer_config.json, or null when there is none."
        )
    mask = token_text(config.get("mask_token"))
    eats_space = mask if mask == ROBERTA_TOKENS["mask_token"] else None  # RoBERTa's: the space before belongs to it
    backend.add_special_tokens([AddedToken(token, lstrip=token == eats_space, normalized=False) for token in named])


def _lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, cut at newlines only (pieces may hold other Unicode line ends)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read as UTF-8 text: {error}") from error
    return text.removesuffix("\n").split("\n")

"""The files a tokenizer lives in, read with suspicion and written so that transformers reads them back.

tokenizer.json             vocabulary, merges, pre-tokenizer, added tokens: all that makes ids
tokenizer_config.json      which token is BOS, EOS, padding; whether BOS is added
special_tokens_map.json    the same names once more (older models)
chat_template.jinja        how messages become text; older models keep it in tokenizer_config.json
generation_config.json     `eos_token_id`: every id that ends an answer
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from bildung.core.errors import TokenizerError
from bildung.core.json_file import read_object

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in `path`; `default` when the file is not there. Raises TokenizerError when unreadable."""
    if default is not None and not path.is_file():
        return dict(default)
    return read_object(path, TokenizerError, "Fetch or save it anew.")


def token_text(value: Any) -> str | None:
    """A token as configs write it: a string, an object with `content`, or null."""
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"tokenizer_config.json: a special token is {value!r}; a string is expected.")
    return value


def without_special_merges(raw: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json without the BPE merges that spell a special token.

    Conversions from SentencePiece list `</` + `s>` -> `</s>`, so that plain text could turn into a control token.
    Where special tokens are parsed, they are cut out before BPE and these merges never apply: no other id changes.
    """
    model, added = raw.get("model"), raw.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list) or not isinstance(added, list):
        return raw
    special = {str(token.get("content")) for token in added if isinstance(token, dict) and token.get("special")}
    # A merge is "a b" or ["a", "b"]; neither piece holds a space.
    kept = [
        m
        for m in model["merges"]
        if not (isinstance(m, str | list) and "".join(map(str, m)).replace(" ", "") in special)
    ]
    return raw if len(kept) == len(model["merges"]) else {**raw, "model": {**model, "merges": kept}}


def find_clashes(backend: tokenizers.Tokenizer, raw: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Ids given twice, and added tokens whose stated id is not the one the tokenizer gives them, as phrases."""
    stated: list[tuple[str, Any, Any]] = []
    for token in raw.get("added_tokens") or []:
        stated.append(("tokenizer.json", token.get("id"), token.get("content")))
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise TokenizerError(
            f"tokenizer_config.json: added_tokens_decoder is a {type(decoder).__name__}, not an object."
        )
    for number, token in decoder.items():
        stated.append(("tokenizer_config.json", int(number) if number.isdigit() else number, token_text(token)))
    clashes = [f"tokenizer.json has {what}" for what in _given_twice(raw.get("model") or {})]
    for file, number, content in stated:
        actual = backend.token_to_id(content) if isinstance(content, str) else None
        if actual != number:
            clashes.append(f"{file} puts the added token {content!r} at id {number}, the vocabulary at {actual}")
    return clashes


def _given_twice(model: Mapping[str, Any]) -> list[str]:
    """What the vocabulary has twice: an id (of a {token: id}), or a piece (of Unigram's list, where the place is the
    id). The library accepts both, and then text and ids no longer stand for each other."""
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, Mapping):
        by_id: dict[Any, str] = {}
        twice = [(token, number) for token, number in vocabulary.items() if by_id.setdefault(number, token) != token]
        return [f"id {number} for {by_id[number]!r} and for {token!r}" for token, number in twice]
    places: dict[str, int] = {}
    pieces = [piece for piece, _ in vocabulary]
    twice = [(piece, place) for place, piece in enumerate(pieces) if places.setdefault(piece, place) != place]
    return [f"the piece {piece!r} at {places[piece]} and at {place}" for piece, place in twice]


def read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, else tokenizer_config.json's (of several, the one named "default")."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise TokenizerError(f"{path} is not UTF-8 text: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        if "default" not in by_name:
            raise TokenizerError(
                f"tokenizer_config.json has the chat templates {sorted(map(str, by_name))} and none named 'default'; "
                "save the one to use as chat_template.jinja."
            )
        template = by_name["default"]
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"tokenizer_config.json: chat_template is a {type(template).__name__}; text is expected.")
    return template


def write_files(
    directory: Path,
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    template: str | None,
    more_stop_ids: Sequence[int],
) -> None:
    """Writes all files. Stop ids go into generation_config.json, where transformers and vLLM look for them."""
    directory.mkdir(parents=True, exist_ok=True)
    # A class name always makes transformers read tokenizer.json as it stands instead of guessing from config.json.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
        if isinstance(config.get("chat_template"), str):
            del config["chat_template"]
    files: dict[str, Any] = {"tokenizer_config.json": config}
    names = {name: token_text(config.get(name)) for name in NAMED_TOKENS}
    files["special_tokens_map.json"] = {name: token for name, token in names.items() if token is not None}
    if more_stop_ids:
        path = directory / "generation_config.json"
        files[path.name] = {**read_json(path, {}), "eos_token_id": list(more_stop_ids)}
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8", newline="")

"""Special tokens by role: what a tokenizer needs besides text.

    bos, eos   begin and end of a sequence        cls, sep   begin of, and end between, an encoder's sentences
    pad        fills a batch up                   mask       stands for a word to guess
    unk        stands for what has no token       control    any others: <|im_start|>, <extra_id_0>

They get the ids after the vocabulary of the text, and only their roles make them special: no text can produce them,
whatever it says. The one exception is the unknown token, which text is meant to produce; it is part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from bildung.core.errors import SettingsError, nearest

ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
PLAIN = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
BERT = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ALONE = ("unk", "mask")  # roles whose token can have no other: it stands in the middle of text


def usual(algorithm: str, needs_unknown: bool) -> dict[str, str]:
    """The special tokens when none are given: BERT's for WordPiece, Llama's names for all others."""
    tokens = BERT if algorithm == "wordpiece" else PLAIN
    return {role: token for role, token in tokens.items() if role != "unk" or needs_unknown}


def check(specials: Mapping[str, str], control: Sequence[str], needs_unknown: bool) -> None:
    """Raises SettingsError for an unknown role, an empty or repeated token, or a missing unknown token.

    bos, eos, cls, sep and pad may share a token (GPT-2's <|endoftext|>, RoBERTa's <s>); unk and mask may not.
    """
    for role in specials:
        if role not in ROLES:
            hint = nearest(role, ROLES) or "there are: " + ", ".join(ROLES)
            raise SettingsError(f"specials: no role is called {role!r}; {hint}")
    for token in (*specials.values(), *control):
        if not token.strip() or token != token.strip():
            raise SettingsError(f"the special token {token!r} is empty or has spaces around it; give it a name")
        if any("\ud800" <= letter <= "\udfff" for letter in token):
            raise SettingsError(f"the special token {token!r} is not Unicode: it holds a lone surrogate")
    for token in control:
        if list(control).count(token) > 1 or token in specials.values():
            raise SettingsError(f"the special token {token!r} is given twice; each of `control` must be a new one")
    for role in ALONE:
        others = [other for other, token in specials.items() if token == specials.get(role) and other != role]
        if others:
            raise SettingsError(
                f"the special token {specials[role]!r} is given twice, as {role} and as {others[0]}; {role} stands in "
                f"the middle of text and needs a token of its own"
            )
    if needs_unknown and "unk" not in specials:
        raise SettingsError(
            "specials: this algorithm needs a token for what is unknown: give one for the role unk, or use "
            "algorithm byte_bpe or byte, or byte_fallback"
        )


def outside(specials: Mapping[str, str], control: Sequence[str], needs_unknown: bool) -> list[str]:
    """The special tokens that come after the vocabulary, each once."""
    inside = specials.get("unk") if needs_unknown else None
    return [token for token in dict.fromkeys((*specials.values(), *control)) if token != inside]


def add(backend: tokenizers.Tokenizer, specials: Mapping[str, str], control: Sequence[str], add_bos: bool) -> None:
    """Adds the special tokens and says where they stand: [CLS] a [SEP] b [SEP], or BOS in front.

    Raises SettingsError when one of them is also a piece of the vocabulary, so that text would produce it.
    """
    unknown = specials.get("unk")
    vocabulary = backend.get_vocab(with_added_tokens=False)
    tokens = list(dict.fromkeys((*specials.values(), *control)))
    for token in tokens:
        if token in vocabulary and token != unknown:
            raise SettingsError(
                f"the special token {token!r} is also a piece of text in the vocabulary; choose one that no text "
                f"contains, such as '<{token.strip('<>[]|')}>'"
            )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    frame: dict[str, Any] = {}
    if "cls" in specials and "sep" in specials:
        cls, sep = specials["cls"], specials["sep"]
        frame = {"single": f"{cls}:0 $A:0 {sep}:0", "pair": f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1"}
        used = [cls, sep]
    elif add_bos:
        used = [specials["bos"]]
        frame = {"single": f"{used[0]}:0 $A:0", "pair": f"{used[0]}:0 $A:0 {used[0]}:1 $B:1"}
    if frame:
        ids = [(token, backend.token_to_id(token) or 0) for token in used]
        backend.post_processor = processors.TemplateProcessing(special_tokens=ids, **frame)


def named(specials: Mapping[str, str]) -> dict[str, str]:
    """The names in tokenizer_config.json: {"bos_token": "<s>", ...}."""
    return {f"{role}_token": specials[role] for role in ROLES if role in specials}

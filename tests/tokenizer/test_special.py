"""Special tokens given twice, without a role, or that are no tokens."""

from __future__ import annotations

from typing import Any

import pytest

from bildung.core.errors import SettingsError
from bildung.tokenizer import special


@pytest.mark.parametrize(
    ("specials", "control", "message"),
    [
        ({"boss": "<s>"}, (), "no role is called 'boss'; did you mean 'bos'"),
        ({"zzz": "<s>"}, (), "no role is called 'zzz'; there are: bos, eos, unk, pad, cls, sep, mask"),
        ({"bos": " "}, (), "special token ' ' is empty or has spaces around it"),
        ({"bos": "<s> "}, (), "has spaces around it"),
        ({"bos": "<\ud800>"}, (), "lone surrogate"),
        ({"bos": "<s>"}, ("<s>",), "'<s>' is given twice; each of `control` must be a new one"),
        ({}, ("<a>", "<b>", "<a>"), "'<a>' is given twice"),
        ({"unk": "<s>", "bos": "<s>"}, (), "'<s>' is given twice, as unk and as bos; unk stands in the middle"),
        ({"mask": "<pad>", "pad": "<pad>"}, (), "'<pad>' is given twice, as mask and as pad"),
    ],
)
def test_what_is_refused(specials: dict[str, str], control: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        special.check(specials, control, needs_unknown=False)


def test_roles_may_share_a_token_as_in_gpt2_and_roberta() -> None:
    special.check(dict.fromkeys(("bos", "eos", "pad"), "<|endoftext|>"), (), needs_unknown=False)
    special.check({"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>"}, (), needs_unknown=True)
    with pytest.raises(SettingsError, match="needs a token for what is unknown"):
        special.check({"bos": "<s>"}, (), needs_unknown=True)


@pytest.mark.parametrize(
    ("needs_unknown", "expected"), [(True, ["<s>", "</s>", "<x>"]), (False, ["<s>", "</s>", "<unk>", "<x>"])]
)
def test_all_but_the_unknown_token_come_after_the_vocabulary(needs_unknown: bool, expected: list[str]) -> None:
    specials: dict[str, Any] = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>"}
    assert special.outside(specials, ("<x>",), needs_unknown) == expected


def test_the_usual_ones() -> None:
    assert special.usual("wordpiece", True)["cls"] == "[CLS]" and "unk" not in special.usual("byte_bpe", False)

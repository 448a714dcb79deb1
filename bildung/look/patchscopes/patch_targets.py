"""Target prompts of Patchscopes: texts with a place for a vector, and what they ask of it.

    token_identity   cat -> cat ... hello -> hello ... ?      repeats: which token is this? (few-shot copying)
    description      Syria: Country in the Middle East, ... x    tells: who or what is this?
    any other text   The official currency of {}                 extracts an attribute: {} is the place, written as x

The first two are the published texts (Ghandeharioun et al. 2024 and their code). An early layer may answer the form of
a prompt instead of the vector: with arrows, "->".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bildung.core.errors import DataError
from bildung.look.prompt import encode_prompt, encode_text
from bildung.model.store import LanguageModel
from bildung.tokens.spans import tokens_of

PLACE, SHOWN = "{}", "x"
NAMED = {
    "token_identity": "cat -> cat\n1135 -> 1135\nhello -> hello\n?",
    "description": (
        "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean multinational "
        "major appliance and consumer electronics corporation, x"
    ),
}


@dataclass(frozen=True)
class Target:
    """A target prompt as the model reads it. position: the absolute one that is patched."""

    tokens: list[int]
    position: int


def target_prompt(lm: LanguageModel, text: str, position: int | None = None, limit: int | None = None) -> Target:
    """The target of a name in NAMED, or of a text. position: which token is patched, from the end where negative;
    default: the token of "{}", or the last. Raises DataError for an empty or too long text, or no such position."""
    text = NAMED.get(text, text)
    longest = limit or getattr(lm.config, "max_position_embeddings", None) or 2**31
    if text.count(PLACE) > 1 or (PLACE in text and position is not None):
        raise DataError(f"{text!r}: give one {PLACE} or a position, so that there is one place for the vector.")
    filled = text.replace(PLACE, SHOWN)
    tokens = encode_prompt(lm, filled, False, longest)
    if PLACE in text:
        return Target(tokens, _last_token(lm, filled, text.index(PLACE), text.index(PLACE) + len(SHOWN), tokens))
    return Target(tokens, place_of(lm, text, tokens, -1 if position is None else position, "target"))


def place_of(lm: LanguageModel, text: str, tokens: Sequence[int], where: int | str, which: str = "source") -> int:
    """The absolute position of a number (negative: from the end), or of the last token of a part of the text.

    Raises DataError for a position past the prompt and for a part that is not in the text."""
    if isinstance(where, str):
        start = text.rfind(where)
        if start < 0 or not where.strip():
            raise DataError(f"{where!r} does not occur in the {which} prompt {text[:80]!r}.")
        return _last_token(lm, text, start, start + len(where), tokens)
    if not -len(tokens) <= where < len(tokens):
        raise DataError(
            f"position {where} lies past the {which} prompt, which has {len(tokens)} tokens: 0 to {len(tokens) - 1}, "
            f"or -1 to {-len(tokens)} from its end."
        )
    return where % len(tokens)


def _last_token(lm: LanguageModel, text: str, start: int, stop: int, tokens: Sequence[int]) -> int:
    if found := tokens_for(lm, text, start, stop, tokens):
        return found[-1]
    raise DataError(f"no token stands for {text[start:stop]!r}; give the position as a number.")


def tokens_for(lm: LanguageModel, text: str, start: int, stop: int, tokens: Sequence[int]) -> list[int]:
    """The places of the tokens that stand for text[start:stop]. Raises DataError where `tokens` are not this text's."""
    ids, spans = encode_text(lm, text)
    if list(tokens) != ids:
        raise DataError("a part of a text cannot be found in a chat template's tokens; give the position as a number.")
    inside = text[start:stop]
    return tokens_of([(start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip()))], spans)[0]

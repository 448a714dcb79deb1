"""Prompts whose answer hangs on one thing, made for any tokenizer: subject-verb agreement, indirect objects.

    agreement   The keys to the cabinet   -> are, not is        corrupted: The key to the cabinet
    ioi         When Mary and John went to the store, John gave a drink to -> Mary, not John
                corrupted, abc:  three other names (Wang et al. 2022, arXiv 2211.00593): who is who is gone
                corrupted, swap: the second John becomes Mary: the answer is turned round

Only names and nouns that are one token (with the space before them) are used, so that the pair has equal lengths and
every place keeps its index. A prompt is put together token by token and must be what the tokenizer makes of its text.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, Literal

from bildung.core.errors import DataError, SettingsError
from bildung.tokens.tokenizer import Tokenizer

Task = Literal["ioi", "agreement"]
Corruption = Literal["abc", "swap"]
Row = dict[str, Any]
Part = tuple[str, str]  # text, and the name of the place of its last token ("" for none)

NAMES = """Mary John Tom James Dan Martin Amy Anna Mark Paul Peter Sarah David Emma Alice Jack Kate Laura Simon Daniel
Susan George Robert Linda Michael Henry Frank Jane Adam Eric Karen Lisa Kevin Brian Jason Steven""".split()
ROOMS, THINGS = "store garden office school station market".split(), "drink book ring gift letter".split()
STORIES = (
    "When {0} and {1} went to the {room}, {2} gave a {thing} to",
    "After {0} and {1} came to the {room}, {2} handed the {thing} to",
    "While {0} and {1} were at the {room}, {2} brought a {thing} to",
)
NOUNS = [
    (word, word + "s")
    for word in """key author doctor teacher student driver actor king boy girl car book
    house tree cat dog friend river window picture letter machine garden table player writer""".split()
]
LINKS = ("near", "behind", "with", "beside")
PLURAL, SINGULAR = (" are", " were", " have"), (" is", " was", " has")


def make_rows(task: Task, tokenizer: Tokenizer, count: int, seed: int = 0, corruption: Corruption = "abc") -> list[Row]:
    """`count` different rows of prompt_pairs.py's form. Raises DataError if the tokenizer has too few whole words,
    SettingsError for no rows."""
    if count < 1:
        raise SettingsError(f"count = {count} pairs; it is at least 1.")
    rng = random.Random(seed)
    draw = _ioi if task == "ioi" else _agreement
    words = [name for name in NAMES if _whole(tokenizer, f" {name}")]
    nouns = [pair for pair in NOUNS if all(_whole(tokenizer, f" {word}") for word in pair)]
    needed, there = (6, words) if task == "ioi" else (4, nouns)
    if len(there) < needed:
        raise DataError(
            f"this tokenizer has {len(there)} of the {len(NAMES if task == 'ioi' else NOUNS)} words of {task!r} as one "
            f"token, {needed} are needed; write pairs of your own as JSONL (see bildung/look/causal/prompt_pairs.py)."
        )
    verbs = [side for side in zip(PLURAL, SINGULAR, strict=True) if all(_whole(tokenizer, verb) for verb in side)]
    if task == "agreement" and not verbs:
        raise DataError(f"this tokenizer has none of the verbs {PLURAL + SINGULAR} as one token.")
    rows: dict[str, Row] = {}
    for _ in range(count * 50):  # what is drawn twice, or does not tokenize part by part, is drawn anew
        row = draw(rng, tokenizer, words, nouns, verbs, corruption)
        if row is not None:
            rows.setdefault(row["clean"], row)
        if len(rows) == count:
            return list(rows.values())
    raise DataError(f"only {len(rows)} different prompts of {task!r} could be made with this tokenizer; ask for fewer.")


def _whole(tokenizer: Tokenizer, text: str) -> bool:
    return len(tokenizer.encode(text, bos=False)) == 1


def _ioi(
    rng: random.Random, tokenizer: Tokenizer, names: list[str], nouns: Any, verbs: Any, corruption: Corruption
) -> Row | None:
    indirect, subject, *others = rng.sample(names, 5)
    io_first = rng.random() < 0.5
    template, room, thing = rng.choice(STORIES), rng.choice(ROOMS), rng.choice(THINGS)

    def parts(a: str, b: str, c: str) -> list[Part]:
        marks = {"{0}": (a, "IO" if io_first else "S1"), "{1}": (b, "S1" if io_first else "IO"), "{2}": (c, "S2")}
        words = template.format("{0}", "{1}", "{2}", room=room, thing=thing).split(" ")
        made: list[Part] = []
        for number, word in enumerate(words):
            text, place = marks.get(word, (word, "end" if number == len(words) - 1 else ""))
            made.append((text if number == 0 else f" {text}", place))
        return made

    pair = (indirect, subject) if io_first else (subject, indirect)
    if corruption == "abc":
        wrong_parts = parts(others[0], others[1], others[2])
    else:
        wrong_parts = parts(*pair, indirect)
    row = _row(tokenizer, parts(*pair, subject), wrong_parts, [f" {indirect}"], [f" {subject}"])
    if row is not None:
        row["places"]["S1+1"] = row["places"]["S1"] + 1
    return row


def _agreement(
    rng: random.Random, tokenizer: Tokenizer, names: Any, nouns: list[tuple[str, str]], verbs: Any, corruption: Any
) -> Row | None:
    head, other = rng.sample(nouns, 2)
    plural, link, number = rng.random() < 0.5, rng.choice(LINKS), rng.randrange(2)

    def parts(is_plural: bool) -> list[Part]:
        tail = [(f" {link}", "link"), (" the", "the"), (f" {other[number]}", "end")]
        return [("The", "The"), (f" {head[is_plural]}", "subject"), *tail]

    plurals, singulars = ([side[index] for side in verbs] for index in (0, 1))
    answers, wrong = (plurals, singulars) if plural else (singulars, plurals)
    return _row(tokenizer, parts(plural), parts(not plural), answers, wrong)


def _row(
    tokenizer: Tokenizer, clean: Sequence[Part], corrupted: Sequence[Part], answers: list[str], wrong: list[str]
) -> Row | None:
    """The row with its places, or None where the text's tokens are not those of its parts one after the other."""
    lengths = []
    for parts in (clean, corrupted):
        ids = [tokenizer.encode(text, bos=number == 0) for number, (text, _) in enumerate(parts)]
        if tokenizer.encode("".join(text for text, _ in parts)) != list(itertools.chain.from_iterable(ids)):
            return None
        lengths.append([len(some) for some in ids])
    if lengths[0] != lengths[1]:
        return None
    ends = list(itertools.accumulate(lengths[0]))
    places = {place: end - 1 for (_, place), end in zip(clean, ends, strict=True) if place}
    texts = ["".join(text for text, _ in parts) for parts in (clean, corrupted)]
    return {"clean": texts[0], "corrupted": texts[1], "answers": answers, "wrong": wrong, "places": places}

"""Converters of nursery entries that hold pairs of a source and a target (see convert.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from bildung.data.convert import Drop, Members, Options
from bildung.data.rows import Row

LETTERS = re.compile(r"[a-z]{2,14}")


def letters_to_phonemes(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """CMUdict as {"source": "c a t", "target": "K AE T"}: words of 2 to 14 letters, with their first pronunciation.

    The stress on a vowel (AE1) is left out, which leaves 39 phonemes. "WORD(1)" is a further pronunciation of WORD.
    """
    (data,) = members.values()
    for word, phonemes in json.loads(data).items():
        spelled = word.lower()
        if re.search(r"\(\d+\)$", spelled):
            drop("a further pronunciation")
        elif not LETTERS.fullmatch(spelled):
            drop("not 2 to 14 letters")
        else:
            yield {"source": " ".join(spelled), "target": re.sub(r"\d", "", phonemes)}

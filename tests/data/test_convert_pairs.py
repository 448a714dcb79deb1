"""Source and target rows out of packages."""

import json
from collections import Counter

from bildung.data import nursery
from bildung.data.convert_pairs import letters_to_phonemes


def test_letters_and_phonemes():
    words = {"CAT": "K AE1 T", "A": "AH0", "CAT(1)": "K AE0 T", "'TIS": "T IH1 Z", "READ": "R EH1 D"}
    dropped = Counter()
    made = list(letters_to_phonemes({"d": json.dumps(words).encode()}, {}, lambda why: dropped.update([why])))
    assert made == [{"source": "c a t", "target": "K AE T"}, {"source": "r e a d", "target": "R EH D"}]
    assert dropped == {"a further pronunciation": 1, "not 2 to 14 letters": 2}


def test_the_split_is_by_word():
    entry = nursery.entry_called("g2p")
    assert entry["key"] == ["source"] and sum(entry["split"].values()) == 100
    rows = [{"source": word, "target": target} for word in ("a b", "c d", "e f") for target in ("X", "Y")]
    splits = nursery.split_rows(rows, entry["split"], entry["key"], Counter())
    assert all(len({row["source"] for row in part}) * 2 == len(part) for part in splits.values())

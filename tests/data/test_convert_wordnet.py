"""WordNet's files in miniature."""

from __future__ import annotations

from collections import Counter

from bildung.data.convert_wordnet import wordnet


def files():
    """Offsets in the index are byte offsets in the data."""
    licence = b"  1 This software and database is being provided to you.\n"
    senses = {
        "noun": [b"00 06 n 02 ocean 0 sea 0 000 | water\n", b"00 05 n 02 as 0 arsenic 0 000 | poison\n"],
        "verb": [b"00 30 v 03 begin 0 start 0 set_about 0 000 | x\n", b"00 30 v 01 sail 0 000 | x\n"],
        "adj": [b"00 00 a 02 galore(ip) 0 abounding 0 000 | x\n"],
        "adv": [b"00 02 r 02 as 0 equally 0 000 | x\n"],
    }
    members = {f"package/dict/data.{kind}": licence + b"".join(lines) for kind, lines in senses.items()}

    def at(kind, number):
        return b"%08d" % (len(licence) + sum(map(len, senses[kind][:number])))

    index = {
        "noun": [b"as n 1 1 @ 1 0 " + at("noun", 1), b"ocean n 1 2 @ ~ 1 1 " + at("noun", 0)],
        "verb": [
            b"begin v 1 0 1 1 " + at("verb", 0),
            b"sail v 1 0 1 1 " + at("verb", 1),
            b"set_about v 1 0 1 0 " + at("verb", 0),
        ],
        "adj": [b"galore a 1 0 1 0 " + at("adj", 0)],
        "adv": [b"as r 1 0 1 1 " + at("adv", 0)],
    }
    return members | {f"package/dict/index.{kind}": licence + b"\n".join(lines) for kind, lines in index.items()}


def test_the_first_sense_of_the_commonest_part_of_speech():
    dropped = Counter()
    rows = list(wordnet(files(), {}, lambda reason: dropped.update([reason])))
    assert rows == [
        {"word": "as", "part_of_speech": "adverb", "synonyms": ["equally"]},  # not arsenic: no tagged sense
        {"word": "begin", "part_of_speech": "verb", "synonyms": ["start"]},  # set_about is two words
        {"word": "galore", "part_of_speech": "adjective", "synonyms": ["abounding"]},
        {"word": "ocean", "part_of_speech": "noun", "synonyms": ["sea"]},
    ]
    assert dropped == {"not a single word": 1, "no synonym": 1}

"""WordNet's database files as synonyms: one row per word, {"word", "part_of_speech", "synonyms"}.

    index.verb   ship v 5 3 @ ~ + 5 1 01954657 ...     lemma, senses, pointers, how many senses are tagged, offsets
    data.verb    01954657 38 v 03 transport 0 send 0 ship 2 ...     at that byte: the words of one sense

The most frequent sense comes first. A word's synonyms are the other words of the first sense of the part of speech that
has most tagged senses ("as" would otherwise be arsenic), and only single words.
"""

# Format: wndb(5WN). Miller 1995, "WordNet: a lexical database for English"; Fellbaum 1998.

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from bildung.data.rows import Row

KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


def wordnet(members: dict[str, bytes], options: dict[str, str], drop: Callable[[str], None]) -> Iterator[Row]:
    """Rows of the words that have a synonym, in alphabetical order."""
    data = {path.rpartition("/")[2]: content for path, content in members.items()}
    best: dict[str, tuple[int, str, list[str]]] = {}  # word -> (tagged senses, part of speech, synonyms)
    for ending, kind in KINDS.items():
        for line in data[f"index.{ending}"].decode().splitlines():
            if line.startswith(" "):  # the licence
                continue
            fields = line.split()
            word, pointers = fields[0], int(fields[3])
            tagged, first = int(fields[5 + pointers]), int(fields[6 + pointers])
            if not word.isalpha():
                drop("not a single word")
                continue
            if word not in best or tagged > best[word][0]:
                others = [other for other in _words_at(data[f"data.{ending}"], first) if other.lower() != word]
                best[word] = (tagged, kind, others)
    for word, (_, kind, synonyms) in sorted(best.items()):
        if synonyms:
            yield {"word": word, "part_of_speech": kind, "synonyms": synonyms}
        else:
            drop("no synonym")


def _words_at(data: bytes, offset: int) -> list[str]:
    """The single words of the sense at a byte offset."""
    fields = data[offset : data.index(b"\n", offset)].decode().split()
    count = int(fields[3], 16)
    words = [re.sub(r"\(\w+\)$", "", word) for word in fields[4 : 4 + 2 * count : 2]]  # galore(ip): its place
    return [word for word in words if word.isalpha()]

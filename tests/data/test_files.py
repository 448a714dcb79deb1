"""Reading files: every form, and what each does with rows that cannot be used."""

import csv
import json

import pytest

from bildung.core.errors import DataError
from bildung.data import files
from bildung.data.sources import rows

ROWS = [{"text": "first", "number": 1}, {"text": "zweite Zeile: ä\u2028weiter", "number": 2}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


@pytest.fixture
def every_form(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    write(tmp_path / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    write(tmp_path / "a.json", json.dumps(ROWS))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "number"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "file.arrow", "stream.arrow"])
def test_forms_with_types_give_the_same_rows(every_form, name):
    assert list(rows(str(every_form / name))) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_give_text(every_form, name):
    assert list(rows(str(every_form / name))) == [{k: str(v) for k, v in row.items()} for row in ROWS]


def test_arrow_folder_of_datasets(tmp_path):
    """What `datasets` saves is read, its state files are not taken for rows."""
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert list(rows(str(tmp_path / "saved"))) == ROWS


def test_jsonl_counts_and_names_what_it_drops(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "bad \xff byte"}',
        b"",
        b'{"text": ',
        b'["a list"]',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b'{"text": "also good", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"text": "last"}',
    ]
    data = rows(write(tmp_path / "bad.jsonl", b"\n".join(lines)))
    assert [row["text"] for row in data] == ["good", "last"]
    assert data.dropped == {
        "not UTF-8": 1,
        "empty": 2,
        "not JSON": 2,
        "not a JSON object": 1,
        "half a surrogate pair": 1,
    }
    assert data.places["not UTF-8"] == ["bad.jsonl:2"] and data.places["empty"] == ["bad.jsonl:3", "bad.jsonl:6"]
    assert data.report().startswith("7 rows not used: 2 empty (bad.jsonl:3, bad.jsonl:6)")


def test_only_the_first_places_are_named(tmp_path):
    data = rows(write(tmp_path / "x.jsonl", "{}\n" * 50 + '{"text": "t"}'))
    assert len(list(data)) == 1 and data.dropped["empty"] == 50
    assert data.places["empty"] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3"] and ", ...)" in data.report()


def test_too_long_a_line_is_dropped_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    data = rows(write(tmp_path / "long.jsonl", json.dumps({"text": "x" * 350}) + '\n{"text": "short"}\n'))
    assert list(data) == [{"text": "short"}] and data.places == {"line longer than 0 MiB": ["long.jsonl:1"]}


def test_byte_order_mark_is_no_data(tmp_path):
    assert list(rows(write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "t"}'))) == [{"text": "t"}]
    assert list(rows(write(tmp_path / "b.csv", b"\xef\xbb\xbftext\nt"))) == [{"text": "t"}]
    assert list(rows(write(tmp_path / "b.txt", b"\xef\xbb\xbft"))) == [{"text": "t"}]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.jsonl", ""),
        ("blank.txt", "\n \n"),
        ("head.csv", "text,label\n"),
        ("broken.jsonl", "{\n{\n"),
        ("latin1.txt", b"caf\xe9"),
        ("list.json", "[]"),
    ],
)
def test_nothing_usable_is_an_error(tmp_path, name, data):
    with pytest.raises(DataError, match=f"{name}: no usable row"):
        list(rows(write(tmp_path / name, data)))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("object.json", '{"text": "t"}', "holds a JSON dict, not an array"),
        ("lines.json", '{"text": "t"}\n{"text": "u"}', "called .jsonl"),
        ("deep.json", "[" * 100_000, "not a JSON file"),
        ("twice.csv", "text,text\na,b", "each once"),
        ("nameless.csv", ",b\n1,2", "each once"),
        ("broken.parquet", "PAR1 but not really", "not a readable Parquet"),
        ("broken.arrow", "ARROW1 but not really", "not a readable Arrow"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        list(rows(write(tmp_path / name, data)))


def test_a_parquet_file_with_a_damaged_page(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"] * 50}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable Parquet"):
        list(rows(str(path)))


def test_csv_rows_of_the_wrong_shape(tmp_path):
    data = rows(write(tmp_path / "t.csv", b'text,label\nfine,1\nshort\nlong,1,2\nb\xffd,0\n,\n"two\nlines",0\n'))
    assert list(data) == [{"text": "fine", "label": "1"}, {"text": "two\nlines", "label": "0"}]
    assert data.dropped == {"number of fields differs from the header's": 2, "not UTF-8": 1, "empty": 1}
    assert data.places["not UTF-8"] == ["t.csv:5"]


def test_txt_is_one_document_or_several(tmp_path):
    assert list(rows(write(tmp_path / "one.txt", "a\n\nb\n"))) == [{"text": "a\n\nb"}]
    data = rows(write(tmp_path / "more.txt", b"a\n<|endoftext|>\nb \xff\nc\n<|endoftext|>\n\n<|endoftext|>\nd"))
    assert list(data) == [{"text": "a"}, {"text": "d"}]
    assert data.dropped == {"document with a line not UTF-8": 1, "empty": 1}


def test_jsonl_streams(tmp_path):
    """The first row comes without reading the rest: the rest may be broken or endless."""
    path = write(tmp_path / "s.jsonl", '{"text": "1"}\n' + "broken\n" * 1000)
    data = rows(path, limit=1)
    assert list(data) == [{"text": "1"}] and not data.dropped

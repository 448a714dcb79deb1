"""record.json and the hashes that identify a directory."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest

from bildung.core.errors import RecordError
from bildung.core.record import (
    RECORD,
    Record,
    as_ancestor,
    damage,
    describe_files,
    hash_directory,
    read_record,
    write_record,
)


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "sub" / "config.json").write_text("{}")
    return directory


def test_a_record_survives_the_disk(tmp_path):
    record = Record(operation="tune lora", settings={"rank": 8}, after={"tasks": {"t": {"value": 0.5}}}, notes=["ü"])
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert os.listdir(tmp_path) == [RECORD]


def test_no_record_is_none(tmp_path):
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", "cannot be read"),
        (b'{"operation": "\xff"}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "holds a list"),
        (b'{"settings": {}}', "'operation' is missing"),
        (b'{"operation": "x", "settings": {}, "secnods": 3}', "did you mean 'seconds'"),
        (b'{"operation": "x", "settings": {}, "seconds": "long"}', "setting 'seconds'"),
        (b'{"operation": "x", "settings": {}, "source": {"path": "a"}}', "source has no path and hash"),
        (b'{"operation": "x", "settings": {}, "companions": {"base": {}}}', "base has no path and hash"),
        (b'{"operation": "x", "settings": {}, "files": {"a": {"bytes": "1"}}}', "the file a has no bytes"),
        (b'{"operation": "x", "settings": {}, "after": {"tasks": 5}}', "not a mapping of mappings"),
        (b'{"operation": "x", "settings": {}, "after": {"tasks": {"t": 5}}}', "not a mapping of mappings"),
        (b'{"operation": "x", "settings": {}, "before": {"tasks": {"t": {"value": "x"}}}}', "'x', no number"),
        (b'{"operation": "x", "settings": {}, "ancestors": [{}]}', "'operation' is missing"),
        (
            b'{"operation": "x", "settings": {}, "ancestors": [{"operation": "y", "settings": {}, "source": {}}]}',
            "source has no path and hash",
        ),
    ],
)
def test_a_broken_record_is_refused(tmp_path, content, words):
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(RecordError, match=words):
        read_record(tmp_path)


def test_numbers_that_are_not_finite_leave_valid_json(tmp_path):
    write_record(tmp_path, Record(operation="x", settings={}, measured={"a": math.nan, "b": [math.inf, 1.0]}))

    def refuse(word):
        raise AssertionError(word)

    content = json.loads((tmp_path / RECORD).read_text(), parse_constant=refuse)
    assert content["measured"] == {"a": None, "b": [None, 1.0]}


def test_the_hash_is_of_names_and_contents_wherever_the_directory_lies(model, tmp_path):
    first = hash_directory(model)
    shutil.copytree(model, tmp_path / "elsewhere")
    assert hash_directory(tmp_path / "elsewhere") == first
    (model / "sub" / "config.json").rename(model / "sub" / "config2.json")
    assert hash_directory(model) != first


def test_logs_pages_records_and_scratch_do_not_count(model):
    first = hash_directory(model)
    for name in ("log.jsonl", "report.html", RECORD, ".scratch"):
        (model / name).write_text('{"operation": "x", "settings": {}}')
    assert hash_directory(model) == first


def test_only_files_that_look_touched_are_hashed_again(model):
    record = Record(operation="x", settings={}, files=describe_files(model))
    write_record(model, record)
    first = hash_directory(model)
    weights = model / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    weights.write_bytes(b"WEIGHTS")  # same size
    os.utime(weights, ns=(stamp, stamp))
    assert hash_directory(model) == first  # believed: nothing was read
    os.utime(weights, ns=(stamp + 1, stamp + 1))
    assert hash_directory(model) != first
    assert damage(model, record) == "model.safetensors was altered"


def test_damage_names_what_is_gone(model):
    record = Record(operation="x", settings={}, files=describe_files(model))
    assert damage(model, record) == ""
    (model / "sub" / "config.json").unlink()
    assert damage(model, record) == "sub/config.json is missing"


def test_an_ancestor_keeps_its_card_but_not_the_bulk():
    card = {"tasks": {"t": {"value": 0.5, "items": [0, 1]}}, "samples": [{}]}
    record = Record(operation="x", settings={}, after=card, ancestors=[{}], files={"f": {}})
    kept = as_ancestor(record)
    assert kept["after"] == {"tasks": {"t": {"value": 0.5}}}
    assert "ancestors" not in kept and "files" not in kept
    assert record.after["tasks"]["t"]["items"] == [0, 1]

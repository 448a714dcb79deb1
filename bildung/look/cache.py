"""Write the activations of a data set to disk: one memory-mapped .npy file per site.

    bildung look cache MODEL OUT --data nursery:imdb --sites "layers.*.resid_post"             a row per token
    bildung look cache MODEL OUT --data notes.jsonl --sites "layers.6.attn.z[:, -1, 2]"        a row per text: its last

    OUT/layers.6.resid_post.npy   (rows, ...): the site's axes after B and L, texts one after the other
    OUT/tokens.npy, OUT/starts.npy    token ids of all texts, and where each text begins in them (one more: the end)

The files have their full size from the start and are filled batch by batch; a run that was stopped goes on after its
last batch. The record names the hash of the weights and of the data; `Activations` reads a cache and refuses the model
of another.
"""

# B texts of a batch, L positions, R rows

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from bildung.core.errors import DataError, ModelFileError, NoSuchSite, RecordError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.progress import progress
from bildung.core.record import Record, hash_directory, read_record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.look.prompt import frame_around
from bildung.model.selection import Selection
from bildung.model.store import LanguageModel, load
from bildung.model.taps import match_selections, observe, sites

PROGRESS, TOKENS, STARTS = "progress.json", "tokens.npy", "starts.npy"


@settings_class
class Settings:
    """A cache of activations."""

    data: str  # texts: a file, a folder, nursery:NAME, mini:NAME or hub:OWNER/NAME
    sites: tuple[str, ...]  # site patterns, with selections where a part is wanted
    limit: int | None = None  # so many texts at most
    max_length: int = 256  # of a text so many tokens are read
    batch_tokens: int = 4096  # tokens that go through the model together
    dtype: Literal["float32", "float16"] = "float32"  # of the numbers on disk; float16 refuses what overflows


def cache(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the cache. Raises NoSuchSite for a site that has no rows of tokens or texts, DataError for no text."""
    if not settings.sites or settings.max_length < 4 or settings.batch_tokens < 1:
        raise SettingsError("sites names at least one, max_length is at least 4 and batch_tokens at least 1.")

    def work(job: Job) -> None:
        lm = load(source)
        texts = _texts(lm, settings)
        starts = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        np.save(job.out / TOKENS, np.concatenate([np.asarray(ids, dtype=np.int32) for ids in texts]))
        np.save(job.out / STARTS, starts)
        done = _fill(lm, texts, starts, settings, job.out)
        job.tokens_seen = int(starts[-1] - starts[done])
        job.measured = {"texts": len(texts), "tokens": int(starts[-1]), "texts of an earlier run": done}
        (job.out / PROGRESS).unlink()

    data = fingerprint(settings.data)
    return perform("look cache", Path(source), out, settings, work, data=data, force=force)


def _texts(lm: LanguageModel, settings: Settings) -> list[list[int]]:
    """Token ids of every text as the model reads it, of a long one its beginning."""
    frame = frame_around(lm)
    longest = min(settings.max_length, getattr(lm.config, "max_position_embeddings", None) or settings.max_length)
    room = longest - frame.size(pair=False)
    texts = (lm.tokenizer.encode(text, bos=False)[:room] for text in documents(settings.data, limit=settings.limit))
    return [frame.put(ids).tokens for ids in texts if ids]


def _fill(lm: LanguageModel, texts: list[list[int]], starts: np.ndarray, settings: Settings, out: Path) -> int:
    """Write every batch that is not there yet; returns how many texts were."""
    chosen = match_selections(lm.model, settings.sites)
    if double := {site for site, _ in chosen if [one for one, _ in chosen].count(site) > 1}:
        raise NoSuchSite(f"{sorted(double)[0]} is named with two selections; a cache holds one part of each site.")
    per_text = {site: _per_text(lm, site, selection) for site, selection in chosen}
    before = json.loads((out / PROGRESS).read_text()) if (out / PROGRESS).is_file() else {"texts": 0}
    files: dict[str, np.memmap[Any, Any]] = {}
    if before["texts"]:
        files = {site: open_memmap(out / f"{site}.npy", mode="r+") for site in per_text}
    with progress("activations", int(starts[-1]), done=int(starts[before["texts"]])) as shown:
        for first, last in _batches(texts, before["texts"], settings.batch_tokens):
            seen = _read(lm, texts[first:last], settings.sites)
            for site, x in seen.items():
                rows = _rows(x, texts[first:last], per_text[site], site).cpu().float().numpy()
                if not np.isfinite(rows.astype(settings.dtype)).all():
                    raise DataError(f"{site} has numbers that are not finite as {settings.dtype}; use float32.")
                if site not in files:
                    count = len(texts) if per_text[site] else int(starts[-1])
                    shape = (count, *rows.shape[1:])
                    files[site] = open_memmap(out / f"{site}.npy", mode="w+", dtype=settings.dtype, shape=shape)
                at = first if per_text[site] else int(starts[first])
                files[site][at : at + len(rows)] = rows
            seen.clear()  # or the next batch is read beside it
            for file in files.values():
                file.flush()
            (out / PROGRESS).write_text(json.dumps({"texts": last}))  # after the numbers, so it never promises too much
            shown.advance(int(starts[last] - starts[first]))
    return int(before["texts"])


def _batches(texts: Sequence[Sequence[int]], first: int, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Neighbouring texts whose padded size fits."""
    while first < len(texts):
        last, longest = first, 0
        while last < len(texts):
            longest = max(longest, len(texts[last]))
            if last > first and longest * (last + 1 - first) > batch_tokens:
                break
            last += 1
        yield first, last
        first = last


@torch.no_grad()
def _read(lm: LanguageModel, texts: Sequence[Sequence[int]], patterns: Sequence[str]) -> dict[str, Tensor]:
    """One forward pass over texts padded on the right; an encoder-decoder reads them as sources."""
    longest, device = max(map(len, texts)), lm.model.device
    tokens_BL = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts], device=device)
    keep_BL = torch.tensor([[n < len(ids) for n in range(longest)] for ids in texts], device=device)
    with observe(lm.model, patterns) as seen:
        (lm.model.encode if hasattr(lm.model, "given") else partial(_hidden, lm.model))(
            tokens_BL, None if bool(keep_BL.all()) else keep_BL
        )
    above = [site for site, _ in match_selections(lm.model, patterns) if site not in seen]
    if above:
        raise NoSuchSite(f"{above[0]} lies above the states that reading a text makes; a cache holds what is below.")
    return seen


def _hidden(model: Any, tokens_BL: Tensor, keep_BL: Tensor | None) -> Tensor:
    h_BLD: Tensor = model.hidden(tokens_BL, keep_BL=keep_BL)
    return h_BLD


def _per_text(lm: LanguageModel, site: str, selection: Selection | None) -> bool:
    """Whether the site has a row for each text, not for each token. Raises NoSuchSite for what has neither."""
    shape = sites(lm.model)[site]
    letters = shape.split()
    if selection is not None and 0 in selection.axes(site, shape):
        raise NoSuchSite(f"{site}{selection.text} chooses rows of a batch; a cache holds all texts.")
    whole = "L" in letters and (selection is None or letters.index("L") not in selection.axes(site, shape))
    if "S" in letters or (whole and letters[1] != "L"):
        raise NoSuchSite(
            f"{site} has the shape {shape}: as wide as the text is long; `look attention` keeps such maps."
        )
    return not whole


def _rows(x: Tensor, texts: Sequence[Sequence[int]], per_text: bool, site: str) -> Tensor:
    if not per_text:
        return torch.cat([row[: len(ids)] for row, ids in zip(x, texts, strict=True)])
    if x.ndim > 2 and x.shape[1] == 1:
        return x[:, 0]
    return x


class Activations:
    """A cache, read without loading it: `cache["layers.6.resid_post"]` is a memory-mapped array (rows, ...).

    lm: the model that it is used with. Raises RecordError for a directory that is no cache, ModelFileError when it was
    made with other weights than those of `lm`.
    """

    def __init__(self, directory: Path, lm: LanguageModel | None = None):
        self.directory = Path(directory)
        record = read_record(self.directory)
        if record is None or record.operation != "look cache" or record.source is None:
            raise RecordError(f"{directory} is no cache of activations; `bildung look cache` makes one.")
        self.record = record
        if lm is not None and lm.path is not None and hash_directory(lm.path) != record.source["hash"]:
            raise ModelFileError(
                f"{directory} holds activations of other weights than those of {lm.path}; make it anew for this model."
            )
        self.tokens, self.starts = (np.load(self.directory / name, mmap_mode="r") for name in (TOKENS, STARTS))
        names = sorted(path.stem for path in self.directory.glob("*.npy"))
        self.sites = tuple(name for name in names if f"{name}.npy" not in (TOKENS, STARTS))

    def __getitem__(self, site: str) -> np.ndarray:
        """All rows of a site. Raises NoSuchSite."""
        if site not in self.sites:
            raise NoSuchSite(f"{site!r} is not in {self.directory}; it holds {', '.join(self.sites)}.")
        found: np.ndarray = np.load(self.directory / f"{site}.npy", mmap_mode="r")
        return found

    def text(self, site: str, number: int) -> np.ndarray:
        """The rows of one text: one per token, or the one of the whole."""
        rows = self[site]
        if len(rows) == len(self.starts) - 1:
            return rows[number]
        return rows[int(self.starts[number]) : int(self.starts[number + 1])]

"""Where the vectors of a data set are kept: in memory or, where they are too many for it, in memory-mapped files.

    FOLDER/layers.6.resid_post.bin    N x F numbers in the model's type, one vector after the other
    FOLDER/progress.json              how many batches are in the files

A file has its full size from the start and is filled batch by batch; a run that was stopped goes on after its last
batch. Unlike a cache of activations (cache.py), which is kept and has a row per token, these are the vectors that one
run wants, and go when it ends.
"""

# N vectors in all, F numbers of one vector

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROGRESS = "progress.json"


class Vectors:
    """`tensors`: {site: NF}. folder: where they go if they need more than `most_bytes`; without one, always memory."""

    def __init__(self, count: int, batches: int, folder: Path | None = None, most_bytes: float = 0.0):
        self.count, self.folder, self.most_bytes = count, folder, most_bytes
        self.tensors: dict[str, Tensor] = {}
        self._files: list[np.memmap[Any, Any]] = []
        self._batches, self.done = batches, 0
        if folder is not None and (folder / PROGRESS).is_file():
            before = json.loads((folder / PROGRESS).read_text())
            if (before["count"], before["batches"]) == (count, batches):
                self.done = before["done"]
                types = {name: getattr(torch, dtype) for name, (_, dtype) in before["sites"].items()}
                self._map({name: width for name, (width, _) in before["sites"].items()}, types)

    def put(self, rows: Mapping[str, Tensor], target: Sequence[int]) -> None:
        """The next batch: for each site the vectors of the places `target`."""
        if rows and not self.tensors:
            widths, types = {name: x.shape[1] for name, x in rows.items()}, {name: x.dtype for name, x in rows.items()}
            needed = sum(self.count * widths[name] * types[name].itemsize for name in rows)
            if self.folder is not None and needed > self.most_bytes:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._map(widths, types)
            else:
                self.tensors = {name: torch.empty(self.count, widths[name], dtype=types[name]) for name in rows}
        for name, x in rows.items():
            self.tensors[name][list(target)] = x.cpu()
        self.done += 1
        if self._files and self.folder is not None:
            for file in self._files:
                file.flush()
            kept = {name: [x.shape[1], str(x.dtype).removeprefix("torch.")] for name, x in self.tensors.items()}
            content = {"count": self.count, "batches": self._batches, "done": self.done, "sites": kept}
            (self.folder / PROGRESS).write_text(json.dumps(content))  # after the numbers: it never promises too much

    def _map(self, widths: Mapping[str, int], types: Mapping[str, torch.dtype]) -> None:
        assert self.folder is not None
        for name, width in widths.items():
            path, shape = self.folder / f"{name}.bin", (self.count, width * types[name].itemsize)
            mode: Any = "r+" if self.done else "w+"
            self._files.append(np.memmap(path, mode=mode, dtype=np.uint8, shape=shape))
            self.tensors[name] = torch.from_numpy(self._files[-1]).view(types[name])  # NumPy has no bfloat16

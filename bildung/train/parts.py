"""Tensors on disk as the ranks hold them: each rank writes its own boxes, and any number of ranks reads them.

    part-0.safetensors    w [0:512, :]    b          a tensor that all ranks hold is written by rank 0
    part-1.safetensors    w [512:1024, :]            the header says where in the whole tensor a box begins

So no rank ever gathers the whole, and a run on eight ranks goes on on two, or on one: a rank that needs rows 300 to 600
takes them from both files. The header is that of torch.distributed.checkpoint's HuggingFaceStorageWriter, whose Reader
opens these files. Its writer is not used: it puts the whole file together in memory first (torch 2.13).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bildung.core import ranks
from bildung.train.shards import is_shard

OFFSETS = "DCP_SHARDING_INFO"  # the key of torch.distributed.checkpoint's header


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it begins, and its size in every dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def common(self, other: Box) -> Box | None:
        """What two boxes share, None if nothing."""
        start = tuple(map(max, self.start, other.start))
        ends = zip(self.start, self.shape, other.start, other.shape, strict=True)
        shape = tuple(min(a + n, b + m) - s for s, (a, n, b, m) in zip(start, ends, strict=True))
        return Box(start, shape) if all(size > 0 for size in shape) else None

    def inside(self, other: Box) -> tuple[slice, ...]:
        """Its place in a larger box."""
        places = zip(self.start, self.shape, other.start, strict=True)
        return tuple(slice(start - corner, start - corner + size) for start, size, corner in places)


def held(tensor: Tensor) -> Box:
    """The box of a tensor that this rank holds: all of it, unless it is spread over ranks."""
    if not is_shard(tensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spread: Any = tensor
    shape, start = compute_local_shape_and_global_offset(spread.shape, spread.device_mesh, spread.placements)
    return Box(tuple(start), tuple(shape))


def is_mine_to_write(tensor: Tensor) -> bool:
    """Of several ranks that hold the same box the first writes it; a box without numbers nobody."""
    if not is_shard(tensor):
        return ranks.rank() == 0
    spread: Any = tensor
    coordinate = spread.device_mesh.get_coordinate()
    first = all(place.is_shard() or at == 0 for place, at in zip(spread.placements, coordinate, strict=True))
    return first and spread.to_local().numel() > 0


def write(path: Path, tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> None:
    """One part: this rank's numbers of every tensor, and where they belong."""
    offsets = {name: {"saved_offsets": list(boxes[name].start)} for name in tensors}
    header = {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: json.dumps(offsets)}
    save_file(dict(tensors), path, metadata=header)


class Parts:
    """All parts of a directory, opened for reading; `shapes` are those of the whole tensors."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._boxes: dict[str, list[tuple[Any, Box]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            opened: Any = safe_open(path, framework="pt")
            offsets = json.loads((opened.metadata() or {}).get(OFFSETS, "{}"))
            for name in opened.keys():  # noqa: SIM118  (safe_open is no dict)
                shape = tuple(opened.get_slice(name).get_shape())
                start = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
                self._boxes.setdefault(name, []).append((opened, Box(start, shape)))
                ends = tuple(map(sum, zip(start, shape, strict=True)))
                self.shapes[name] = tuple(map(max, ends, self.shapes.get(name, ends)))

    def under(self, prefix: str) -> dict[str, str]:
        """Name without the prefix -> name, of everything that has it."""
        return {name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)}

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """A tensor; spread over ranks as `like` is, if that is: then only this rank's numbers are read."""
        box = Box((0,) * len(self.shapes[name]), self.shapes[name]) if like is None else held(like)
        numbers = self._numbers(name, box)
        if like is None or not is_shard(like):
            return numbers
        from torch.distributed.tensor import DTensor

        spread: Any = like
        numbers = numbers.to(spread.to_local().device)
        mesh, places = spread.device_mesh, spread.placements
        return DTensor.from_local(numbers, mesh, places, shape=spread.shape, stride=spread.stride())

    def _numbers(self, name: str, wanted: Box) -> Tensor:
        """A box of a tensor, in memory of its own: inside a file's bytes a tensor is not aligned, and a kernel may then
        round in another way."""
        found = None
        for opened, there in self._boxes[name]:
            if not wanted.shape:
                return torch.clone(opened.get_tensor(name))
            if found is None:
                dtype = opened.get_slice(name)[tuple(slice(0, 0) for _ in wanted.shape)].dtype
                found = torch.zeros(wanted.shape, dtype=dtype)
            if common := wanted.common(there):
                found[common.inside(wanted)] = opened.get_slice(name)[common.inside(there)]
        assert found is not None
        return found

"""Tensors of a model directory on disk: one model.safetensors, or shards with their index. Never a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bildung.core.errors import ModelFileError

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # transformers' default


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a directory. Raises ModelFileError for a missing or damaged file."""
    index = directory / INDEX
    files = [directory / NAME]
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ModelFileError(f"{index} is not a safetensors index: {error!r}.") from error
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
            raise ModelFileError(f"{index} names files outside its directory; plain file names are expected.")
        files = [directory / shard for shard in shards]
    for file in files:
        yield from read_file(file)


def read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in one file."""
    if not file.exists():
        pickles = sorted(p.name for p in file.parent.glob("*") if p.suffix in {".bin", ".pt", ".pth"})
        hint = f" ({', '.join(pickles)}: pickles are never opened; convert them to safetensors)" if pickles else ""
        raise ModelFileError(f"{file} is missing{hint}.")
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (safe_open is no dict)
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{file} is damaged or truncated ({error}); fetch or make it again.") from error


def write_tensors(tensors: dict[str, Tensor], directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `max_shard_bytes` with an index, as transformers names them."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_file(tensors, directory / NAME)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(shard, directory / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(tensors: dict[str, Tensor], file: Path) -> None:
    """Write one safetensors file, readable for everybody: the library makes it for its owner alone."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)

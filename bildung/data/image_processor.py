"""From an image file to the numbers a model reads, as its preprocessor_config.json says (Hugging Face's format).

    decode -> channels -> resize -> crop the middle        whole numbers 0..255    `pixels`
           -> rescale to 0..1 -> (x - mean) / deviation    real numbers            `normalize`

A model that is fed with other means, or with images resized by another filter, loses accuracy and says nothing; so the
numbers travel with it. Resizing is Pillow's, whose filters average when they shrink (torch's do not unless asked to).
Images are hostile until decoded: format, number of pixels and truncation are checked.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

import base64
import binascii
import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bildung.core.errors import ModelFileError, nearest
from bildung.core.json_file import read_object
from bildung.data.rows import Unusable

FILE = "preprocessor_config.json"
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
LARGEST = 100_000_000  # pixels of one image; a small file can claim billions
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers
LIKE_RGB = ("1", "L", "P", "CMYK", "YCbCr")  # become three channels without loss, or as everybody converts them
TYPES = ("ViTImageProcessor", "BitImageProcessor")
INERT = {"feature_extractor_type", "processor_class", "data_format", "return_tensors", "device", "input_data_format"}


@dataclass(frozen=True)
class ImageProcessor:
    """How images become input. A step whose field is None is left out."""

    mean: tuple[float, ...] | None  # per channel, of values rescaled
    std: tuple[float, ...] | None
    size: tuple[int, int] | int | None  # (height, width), or the length of the shorter side
    crop: tuple[int, int] | None = None  # (height, width) out of the middle; what is smaller gets a black border
    resample: int = 2  # PIL's filter (RESAMPLE)
    rescale: float | None = 1 / 255
    convert_rgb: bool = False  # whatever the image, three channels; transparency is laid on white

    def resized(self, height: int, width: int) -> ImageProcessor:
        """The same, for images of another size: no crop, no regard to proportions."""
        changed = {**vars(self), "size": (height, width), "crop": None}
        return ImageProcessor(**changed)

    def pixels(self, image: Image.Image) -> Tensor:
        """The image's channels CHW at the wanted size, uint8. Raises Unusable for another number of channels."""
        image = self._channels(image)
        if self.size is not None:
            width, height = image.size
            if isinstance(self.size, int):
                longer = int(self.size * max(width, height) / min(width, height))
                target = (self.size, longer) if width <= height else (longer, self.size)
            else:
                target = (self.size[1], self.size[0])
            image = image.resize(target, Image.Resampling(self.resample))
        values = np.array(image)
        values_CHW = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(self._middle(values_CHW)))

    def normalize(self, pixels_CHW: Tensor) -> Tensor:
        """What the model reads, float32, of one image or a batch of them."""
        x = pixels_CHW.float()
        if self.rescale is not None:
            x = x * self.rescale
        if self.mean is not None and self.std is not None:
            x = (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        return x

    def __call__(self, image: Image.Image) -> Tensor:
        """One image CHW, ready."""
        return self.normalize(self.pixels(image))

    def _channels(self, image: Image.Image) -> Image.Image:
        wanted = 3 if self.convert_rgb or self.mean is None else len(self.mean)
        if wanted == 3 and (self.convert_rgb or image.mode in LIKE_RGB):
            return rgb(image)
        if wanted == 1 and image.mode == "1":
            image = image.convert("L")
        if image.mode not in ("L", "RGB", "RGBA") or len(image.getbands()) != wanted:
            raise Unusable(f"an image with {len(image.getbands())} channels ({image.mode}), {wanted} are needed")
        return image

    def _middle(self, values_CHW: np.ndarray) -> np.ndarray:
        if self.crop is None:
            return values_CHW
        C, H, W = values_CHW.shape
        height, width = self.crop
        framed = np.zeros((C, max(H, height), max(W, width)), values_CHW.dtype)
        # As transformers does: of an odd border the larger half stands before, of an odd rest the smaller half goes.
        top, left = -((H - framed.shape[1]) // 2), -((W - framed.shape[2]) // 2)
        framed[:, top : top + H, left : left + W] = values_CHW
        top, left = max((H - height) // 2 + top, 0), max((W - width) // 2 + left, 0)
        return framed[:, top : top + height, left : left + width]

    def write(self, directory: Path) -> None:
        """preprocessor_config.json, which transformers reads as well."""
        raw: dict[str, Any] = {"image_processor_type": TYPES[self.crop is not None or isinstance(self.size, int)]}
        raw |= {"do_resize": self.size is not None, "resample": self.resample}
        if self.size is not None:
            height_width = self.size if isinstance(self.size, tuple) else None
            raw["size"] = _size_json(height_width) if height_width else {"shortest_edge": self.size}
        raw |= {"do_center_crop": True, "crop_size": _size_json(self.crop)} if self.crop else {"do_center_crop": False}
        raw |= {"do_rescale": self.rescale is not None, "do_normalize": self.mean is not None}
        raw |= {"rescale_factor": self.rescale} if self.rescale is not None else {}
        raw |= {"image_mean": self.mean, "image_std": self.std} if self.mean is not None else {}
        raw |= {"do_convert_rgb": self.convert_rgb}
        (directory / FILE).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_processor(directory: Path) -> ImageProcessor:
    """The ImageProcessor of a model directory. Raises ModelFileError for a file that is missing, broken, or asks for
    what is not built here."""
    path = directory / FILE
    if not path.exists():
        raise ModelFileError(f"{directory} holds no {FILE}, so it is not known how images become its input.")
    return _Keys(path, read_object(path, ModelFileError)).processor()


class _Keys:
    """The keys of one preprocessor_config.json; what nobody takes is refused."""

    def __init__(self, path: Path, raw: dict[str, Any]):
        self.path = path
        self.left = {key: value for key, value in raw.items() if key not in INERT and value is not None}

    def fail(self, name: str, value: Any, needed: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {name} = {str(value)[:80]!r}; {needed} is needed.")

    def processor(self) -> ImageProcessor:
        kind = self.left.pop("image_processor_type", TYPES[0]).removesuffix("Fast").removesuffix("Pil")
        if kind not in TYPES:
            raise self.fail("image_processor_type", kind, " or ".join(TYPES))
        bit = kind == "BitImageProcessor"
        default = 0.5 if not bit else None
        size = self.sides("size", {"shortest_edge": 224} if bit else {"height": 224, "width": 224}, square=not bit)
        crop = self.sides("crop_size", {"height": 224, "width": 224}, square=True)
        resample, factor = self.left.pop("resample", 3 if bit else 2), self.left.pop("rescale_factor", 1 / 255)
        if resample not in RESAMPLE or isinstance(resample, bool):
            raise self.fail("resample", resample, "a number of " + ", ".join(f"{k} ({v})" for k, v in RESAMPLE.items()))
        if not isinstance(factor, int | float) or isinstance(factor, bool):
            raise self.fail("rescale_factor", factor, "a number")
        mean, std = self.channel("image_mean", default), self.channel("image_std", default)
        if len(mean) != len(std) or not all(std):
            raise self.fail("image_std", std, f"{len(mean)} numbers, none of them 0,")
        if isinstance(crop, int) or self.flag("do_pad", False):
            raise self.fail("crop_size or do_pad", crop, "height and width, and no padding,")
        found = ImageProcessor(
            size=size if self.flag("do_resize", True) else None,
            crop=crop if self.flag("do_center_crop", bit) else None,
            resample=resample,
            rescale=factor if self.flag("do_rescale", True) else None,
            mean=mean if (normalize := self.flag("do_normalize", True)) else None,
            std=std if normalize else None,
            convert_rgb=self.flag("do_convert_rgb", bit),
        )
        if self.left:
            name = next(iter(self.left))
            known = (*vars(found), "do_resize", "image_mean", "image_std", "crop_size")
            raise ModelFileError(
                f"{self.path}: unknown key {name!r}; it could change the input. {nearest(name, known)}"
            )
        return found

    def flag(self, name: str, default: bool) -> bool:
        value = self.left.pop(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, value, "true or false")
        return value

    def channel(self, name: str, default: float | None) -> tuple[float, ...]:
        value = self.left.pop(name, [default] * 3)
        value = value if isinstance(value, list) else [value]
        good = len(value) in (1, 3) and all(isinstance(one, int | float) and one is not True for one in value)
        if not good:
            raise self.fail(name, value, "a number for each of 1 or 3 channels")
        return tuple(float(one) for one in value)

    def sides(self, name: str, default: Any, square: bool) -> tuple[int, int] | int:
        given = self.left.pop(name, default)
        if isinstance(given, int):  # the form of old files
            given = {"height": given, "width": given} if square else {"shortest_edge": given}
        names = set(given) if isinstance(given, dict) else set()
        if names not in ({"height", "width"}, {"shortest_edge"}) or not all(
            isinstance(side, int) and side is not True and 0 < side < 2**14 for side in given.values()
        ):
            raise self.fail(name, given, '{"height": ..., "width": ...} or {"shortest_edge": ...} in pixels')
        return given["shortest_edge"] if "shortest_edge" in given else (given["height"], given["width"])


def _size_json(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def rgb(image: Image.Image) -> Image.Image:
    """Three channels; what is transparent is laid on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def decode(cell: Any) -> Image.Image:
    """An image out of a row: PNG, JPEG ... as bytes or base64 text, {"bytes": ...} as `datasets` keeps it, a path, or a
    PIL image. Raises Unusable with the reason."""
    if isinstance(cell, Image.Image):
        return cell
    if isinstance(cell, dict):
        cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, Path):
        try:
            cell = cell.read_bytes()
        except OSError as error:
            raise Unusable(f"an image file that cannot be read ({error.strerror})") from error
    if isinstance(cell, str):
        try:
            cell = base64.b64decode(cell, validate=True)
        except (binascii.Error, ValueError):
            raise Unusable("text that is not base64 where an image is expected") from None
    if not isinstance(cell, bytes):
        raise Unusable(f"a {type(cell).__name__} where an image is expected")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged metadata, and of the sizes that are checked here
        try:
            image = Image.open(io.BytesIO(cell), formats=FORMATS)
            if image.width * image.height > LARGEST:
                raise Unusable(f"an image of more than {LARGEST} pixels")
            image.load()
        except UnidentifiedImageError:
            raise Unusable(f"bytes that are none of {', '.join(FORMATS)}") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Unusable(f"a damaged image ({str(error)[:80]})") from error
    return image

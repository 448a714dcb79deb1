"""Preprocessing equals transformers' Pillow-based processors, on images larger, smaller and of other proportions."""

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
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bildung.core.errors import ModelFileError
from bildung.data.image_processor import ImageProcessor, decode, read_processor
from bildung.data.rows import Unusable

PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (ViTImageProcessorPil, dict(size={"height": 32, "width": 48})),
    "vit bicubic": (ViTImageProcessorPil, dict(size={"height": 20, "width": 20}, resample=3)),
    "vit nothing": (ViTImageProcessorPil, dict(do_resize=False, do_normalize=False)),
    "bit": (BitImageProcessorPil, dict(size={"shortest_edge": 33}, crop_size={"height": 30, "width": 30})),
    "bit crop larger": (BitImageProcessorPil, dict(size={"shortest_edge": 21}, crop_size={"height": 40, "width": 27})),
    "bit raw": (BitImageProcessorPil, dict(size={"shortest_edge": 30}, do_rescale=False, do_center_crop=False)),
}
MODES = ("RGB", "RGBA", "P", "L")


def picture(mode: str = "RGB", width: int = 57, height: int = 41, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA" if mode == "RGBA" else None).resize((width, height)).convert(mode)


@pytest.mark.parametrize("size", [(57, 41), (30, 61), (19, 23)])
@pytest.mark.parametrize("name", PEERS)
def test_equal_to_transformers(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    kind, changes = PEERS[name]
    peer = kind(**changes)
    peer.save_pretrained(tmp_path)
    ours = read_processor(tmp_path)
    for mode in MODES if "Bit" in kind.__name__ else ("RGB",):
        image = picture(mode, *size)
        theirs = torch.as_tensor(np.array(peer(image)["pixel_values"][0]))
        assert ours(image).shape == theirs.shape, mode
        assert (ours(image) - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max())), mode


def test_another_filter_is_another_input(tmp_path: Path) -> None:
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path)
    ours = read_processor(tmp_path)
    changed = ImageProcessor(**{**vars(ours), "resample": 0})
    assert (ours(picture()) - changed(picture())).abs().max() > 0.05


def test_grey_images(tmp_path: Path) -> None:
    peer = ViTImageProcessorPil(size={"height": 14, "width": 14}, image_mean=[0.4], image_std=[0.2])
    peer.save_pretrained(tmp_path)
    grey = picture("L")
    theirs = torch.as_tensor(np.array(peer(grey)["pixel_values"][0]))
    ours = read_processor(tmp_path)
    assert ours(grey).shape == (1, 14, 14) and (ours(grey) - theirs).abs().max() < 1e-5
    with pytest.raises(Unusable, match=r"3 channels .RGB., 1 are needed"):
        ours(picture("RGB"))
    three = ImageProcessor(mean=(0.5,) * 3, std=(0.5,) * 3, size=(14, 14))
    assert torch.equal(three(grey)[0], three(grey)[2])  # grey becomes three equal channels
    with pytest.raises(Unusable, match="4 channels"):
        three(picture("RGBA"))


@pytest.mark.parametrize(
    "processor",
    [
        ImageProcessor(mean=(0.1,), std=(0.3,), size=(28, 35)),
        ImageProcessor(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), size=64, crop=(56, 42), resample=3, convert_rgb=True),
        ImageProcessor(mean=None, std=None, size=None, rescale=None),
    ],
)
def test_written_and_read_again(processor: ImageProcessor, tmp_path: Path) -> None:
    processor.write(tmp_path)
    assert read_processor(tmp_path) == processor


def test_what_is_written_opens_in_transformers(tmp_path: Path) -> None:
    processor = ImageProcessor(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), size=40, crop=(35, 28), convert_rgb=True)
    processor.write(tmp_path)
    peer = BitImageProcessorPil.from_pretrained(tmp_path)
    theirs = torch.as_tensor(np.array(peer(picture())["pixel_values"][0]))
    assert (processor(picture()) - theirs).abs().max() < 1e-5


def test_resized_keeps_the_numbers() -> None:
    processor = ImageProcessor(mean=(0.1,), std=(0.3,), size=30, crop=(28, 28))
    other = processor.resized(35, 42)
    assert (other.size, other.crop, other.mean) == ((35, 42), None, (0.1,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(image_processor_type="SamImageProcessor"), "ViTImageProcessor or BitImageProcessor"),
        (dict(resample=9), "bicubic"),
        (dict(resample="bicubic"), "bicubic"),
        (dict(size={"longest_edge": 3}), "shortest_edge"),
        (dict(size={"height": 0, "width": 3}), "pixels"),
        (dict(image_mean=[0.5, 0.5]), "1 or 3 channels"),
        (dict(image_std=[0.5, 0.0, 0.5]), "none of them 0"),
        (dict(do_resize="yes"), "true or false"),
        (dict(do_pad=True), "no padding"),
        (dict(rescale_factor="1/255"), "a number"),
        (dict(do_centre_crop=True), "unknown key 'do_centre_crop'"),
    ],
)
def test_bad_files_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    ViTImageProcessorPil().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelFileError, match=said):
        read_processor(tmp_path)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"holds no preprocessor_config\.json"):
        read_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelFileError, match="cannot be read as JSON"):
        read_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match="holds a list"):
        read_processor(tmp_path)


def as_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_images_are_decoded_from_every_form(tmp_path: Path) -> None:
    data = as_bytes(picture())
    (tmp_path / "a.png").write_bytes(data)
    forms = [data, base64.b64encode(data).decode(), {"bytes": data, "path": None}, tmp_path / "a.png", picture()]
    assert all(np.array_equal(np.array(decode(form)), np.array(picture())) for form in forms)
    assert decode(as_bytes(picture(), "JPEG")).size == (57, 41)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (b"no image", "none of PNG"),
        (b"", "none of PNG"),
        (as_bytes(picture())[:200], "damaged image"),
        ("not base64!", "not base64"),
        (7, "int where an image"),
        (None, "NoneType"),
        ({"bytes": None, "path": None}, "NoneType"),
        (b"P6 200000 200000 255\n" + b"0" * 20, "pixels|damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG"),  # PIL would start Ghostscript
    ],
)
def test_what_is_no_image_says_so(cell: Any, said: str) -> None:
    with pytest.raises(Unusable, match=said):
        decode(cell)

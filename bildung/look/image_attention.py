"""See where the class token of a vision model looks on an image: every head of every layer, as heat over the picture.

    bildung look image_attention MODEL OUT --image cat.png
    bildung look image_attention MODEL OUT --image cat.png --size 448      more patches, finer maps

The class token collects what the head on top will read, so its attention says which patches it read from (not that they
mattered: for that, intervene). OUT gets image_attention.png, image_attention.json and patterns.safetensors.
"""

# N layers, H heads, R rows and C columns of patches, L tokens: the class token, registers, patches

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bildung.core.errors import DataError
from bildung.core.operation import Job, perform
from bildung.core.record import Record, hash_file
from bildung.core.settings import settings as settings_class
from bildung.data.image_processor import ImageProcessor, decode, read_processor
from bildung.data.rows import Unusable
from bildung.look.pages.image_picture import draw_image_attention
from bildung.model.store import LanguageModel, load
from bildung.model.taps import observe


@settings_class
class Settings:
    """Attention of the class token over an image."""

    image: Path  # PNG, JPEG ...
    size: int | None = None  # height and width to resize it to; default: as the model's preprocessing says


@dataclass
class ImageAttention:
    """What the class token takes from each patch. probs_NHRC sums to less than 1: the rest stays on itself (own_NH),
    or goes to registers."""

    probs_NHRC: Tensor
    own_NH: Tensor
    pixels_HWC: Tensor  # uint8, as the model saw it
    predicted: str | None  # the class, with its probability, where the model has a head

    def entropy(self) -> Tensor:
        """NH: how widely a head looks, in nats, of its attention on patches; log(R·C) is everywhere alike."""
        p = self.probs_NHRC.flatten(2)
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-12)
        return -(p * p.clamp_min(1e-12).log()).sum(-1)


def image_attention(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the picture and the patterns. Raises DataError for what is no image or no vision model."""

    def work(job: Job) -> None:
        lm = load(source)
        if lm.config.kind != "vision":
            raise DataError(f"{source} is a {lm.config.model_type}, which does not read images.")
        found = look_at(lm, read_processor(Path(source)), settings.image, settings.size)
        numbers = as_json(found, Path(source).name, settings.image.name)
        (job.out / "image_attention.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")
        save_file({"probs": found.probs_NHRC.contiguous(), "own": found.own_NH}, job.out / "patterns.safetensors")
        title = f"{Path(source).name}: where the class token looks" + (
            f", {found.predicted}" if found.predicted else ""
        )
        shown = found.pixels_HWC.numpy()
        draw_image_attention(shown, found.probs_NHRC.numpy(), title, job.out / "image_attention.png")
        job.tokens_seen = 1 + found.probs_NHRC[0, 0].numel()
        job.measured = {key: numbers[key] for key in ("predicted", "grid", "narrowest head", "highest on itself")}

    if not settings.image.expanduser().is_file():
        raise DataError(f"{settings.image} is not a file; give an image (PNG, JPEG ...).")
    data = {str(settings.image): hash_file(settings.image.expanduser())}
    return perform("look image_attention", Path(source), out, settings, work, data=data, force=force)


@torch.no_grad()
def look_at(
    lm: LanguageModel, processor: ImageProcessor, image: Path | Image.Image, size: int | None
) -> ImageAttention:
    """Patterns of the class token on one image. Raises DataError when it is none or its size does not fit."""
    processor = processor if size is None else processor.resized(size, size)
    try:
        pixels_CHW = processor.pixels(decode(image.expanduser() if isinstance(image, Path) else image))
    except Unusable as reason:
        raise DataError(f"{image}: {reason}.") from reason
    with observe(lm.model, "layers.*.attn.probs") as seen:
        h_BLD = lm.model.hidden(processor.normalize(pixels_CHW)[None].to(lm.model.device))
    own_row_NHL = torch.stack([probs[0, :, 0].float().cpu() for probs in seen.values()])
    shape = lm.config.image
    rows, columns = (side // shape.patch_size for side in pixels_CHW.shape[-2:])
    patches = own_row_NHL[:, :, 1 + shape.registers :].unflatten(-1, (rows, columns))
    predicted = None
    if lm.model.classifier is not None:
        p, index = lm.model.classify(h_BLD)[0].float().softmax(-1).max(-1)
        names = lm.config.raw.get("id2label") or {}
        predicted = f"{names.get(str(int(index)), int(index))} ({float(p):.2f})"
    seen_pixels = pixels_CHW.expand(3, -1, -1) if len(pixels_CHW) == 1 else pixels_CHW
    return ImageAttention(patches, own_row_NHL[:, :, 0].contiguous(), seen_pixels.permute(1, 2, 0), predicted)


def as_json(found: ImageAttention, model: str, image: str) -> dict[str, Any]:
    """The numbers of every head, [layer][head]."""
    entropy_NH = found.entropy()

    def best(values_NH: Tensor) -> str:
        layer, head = divmod(int(values_NH.argmax()), values_NH.shape[1])
        return f"layer {layer} head {head}: {float(values_NH.max().abs()):.3g}"

    return {
        "model": model,
        "image": image,
        "predicted": found.predicted,
        "grid": list(found.probs_NHRC.shape[-2:]),
        "narrowest head": best(-entropy_NH).replace("-", ""),
        "highest on itself": best(found.own_NH),
        "entropy": [[round(value, 4) for value in row] for row in entropy_NH.tolist()],
        "on itself": [[round(value, 4) for value in row] for row in found.own_NH.tolist()],
    }

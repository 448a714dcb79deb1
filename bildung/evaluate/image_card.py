"""What an image classifier can do, as a card (see card.py): its accuracy at its own size and at others, and two
baselines that learn nothing: the most frequent class, and the nearest training image.

Positions of a ViT are learned for one grid of patches; at another size they are stretched (model/vit.py), and accuracy
falls by how well that works.
"""

# N images measured, M images of training, J pixels of an image

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import DataError
from bildung.core.hardware import Tidy
from bildung.data.image_processor import ImageProcessor
from bildung.data.images import Images
from bildung.evaluate.metrics import as_json
from bildung.model.config import ModelConfig

LARGEST_SIDE = 32  # the nearest neighbour looks at images averaged down to this
MOST = 10_000  # and at no more training images than this, the first


def check_sizes(config: ModelConfig, sizes: tuple[int, ...]) -> None:
    """Raises DataError for a size that does not divide into the model's patches."""
    assert config.image is not None
    patch = config.image.patch_size
    if wrong := [size for size in sizes if size < patch or size % patch]:
        near = max(patch, round(wrong[0] / patch) * patch)
        raise DataError(f"images of {wrong[0]} px do not divide into patches of {patch} px; take {near}.")


@torch.no_grad()
def image_card(model: Any, measured: Mapping[str, tuple[Images, ImageProcessor]]) -> dict[str, Any]:
    """{name: (images, their processor)} -> a card with the accuracy of each; items are 1 or 0 per image."""
    start, tasks = time.monotonic(), {}
    was_training = model.training
    model.eval()
    for name, (images, processor) in measured.items():
        items: list[float] = []
        tidy = Tidy()
        for batch in images.batches(processor):
            batch = batch.to(model.device)
            items += (model(batch.pixels_BCHW).argmax(-1) == batch.labels_B).float().tolist()
            tidy()
        tasks[name] = as_json("acc", items) | {"docs": docs_hash(images)}
    model.train(was_training)
    fingerprint = hashlib.sha256("".join(f"{name} {task['docs']}\n" for name, task in tasks.items()).encode())
    seconds = round(time.monotonic() - start, 1)
    return {"fingerprint": fingerprint.hexdigest(), "tasks": tasks, "samples": [], "seconds": seconds}


def docs_hash(images: Images) -> str:
    """sha256 of the pixels and labels: cards are paired only where both saw the same."""
    digest = hashlib.sha256(images.pixels_NCHW.contiguous().numpy().tobytes())
    digest.update(images.labels_N.numpy().tobytes())
    return digest.hexdigest()


def majority(train: Images, test: Images) -> float:
    """Accuracy of saying the most frequent class of the training images every time."""
    most = int(train.labels_N.bincount().argmax())
    return float((test.labels_N == most).float().mean())


def nearest_neighbour(train: Images, test: Images) -> float:
    """Accuracy of giving each image the label of the training image whose pixels are closest (Euclidean)."""
    test_NJ, pixels_MCHW = _flat(test.pixels_NCHW), train.pixels_NCHW[:MOST]
    least_N, nearest_N = torch.full((len(test_NJ),), torch.inf), torch.zeros(len(test_NJ), dtype=torch.long)
    for start in range(0, len(pixels_MCHW), 512):
        part_PJ = _flat(pixels_MCHW[start : start + 512])
        # ‖a - b‖² = ‖a‖² - 2ab + ‖b‖², and ‖b‖² is the same for all training images
        found_N, place_N = (part_PJ.pow(2).sum(1) - 2 * test_NJ @ part_PJ.T).min(1)
        nearest_N = torch.where(found_N < least_N, start + place_N, nearest_N)
        least_N = torch.minimum(found_N, least_N)
    return float((train.labels_N[nearest_N] == test.labels_N).float().mean())


def _flat(pixels_NCHW: Tensor) -> Tensor:
    x = pixels_NCHW / 255
    if max(x.shape[-2:]) > LARGEST_SIDE:
        x = torch.cat([F.adaptive_avg_pool2d(part, LARGEST_SIDE) for part in x.split(256)])
    return x.flatten(1)

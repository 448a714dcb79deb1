"""Accuracy of images as a card, and the two baselines by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.data.image_processor import ImageProcessor
from bildung.data.images import Images
from bildung.evaluate.compare import compare_cards
from bildung.evaluate.image_card import check_sizes, image_card, majority, nearest_neighbour
from bildung.model.config import ModelConfig

PLAIN = ImageProcessor(mean=None, std=None, size=None, rescale=None)


def images(*rows: tuple[int, int]) -> Images:
    """One-pixel images: (value, label)."""
    values, labels = torch.tensor(rows).T
    return Images(values.to(torch.uint8)[:, None, None, None], labels, ("a", "b", "c"))


class Threshold(torch.nn.Module):
    """Says class 1 above a value."""

    device = torch.device("cpu")

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        above_B = (pixels_BCHW.flatten(1)[:, 0] > self.value).float()
        return torch.stack((1 - above_B, above_B, 0 * above_B), dim=1)


def test_baselines_by_hand() -> None:
    train = images((10, 0), (20, 0), (200, 1), (100, 2), (110, 2), (120, 2))
    test = images((12, 0), (190, 1), (130, 2), (60, 0))  # 60 is as near to 20 as to 100: the first, 20
    assert majority(train, test) == 0.25
    assert nearest_neighbour(train, test) == 1.0
    assert nearest_neighbour(train, images((160, 0), (161, 1), (159, 2))) == pytest.approx(2 / 3)


def test_large_images_are_averaged_down() -> None:
    bright, dark = torch.full((1, 3, 64, 64), 250), torch.full((1, 3, 64, 64), 5)
    train = Images(torch.cat((bright, dark)).to(torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    assert nearest_neighbour(train, train) == 1.0


def test_a_card_pairs_with_another_on_the_same_images() -> None:
    test = images((10, 0), (90, 0), (150, 1), (200, 1))
    a = image_card(Threshold(50), {"images": (test, PLAIN)})
    b = image_card(Threshold(100), {"images": (test, PLAIN)})
    assert a["tasks"]["images"]["items"] == [1.0, 0.0, 1.0, 1.0] and b["tasks"]["images"]["value"] == 1.0
    (difference,) = compare_cards(a, b)
    assert (difference.difference, difference.n, difference.higher_is_better) == (0.25, 4, True)
    other = image_card(Threshold(50), {"images": (images((10, 0), (90, 0), (150, 1), (201, 1)), PLAIN)})
    assert not compare_cards(a, other) and a["fingerprint"] != other["fingerprint"]


def test_sizes_must_divide() -> None:
    config: Any = SimpleNamespace(image=SimpleNamespace(patch_size=7))
    fits: ModelConfig = config
    check_sizes(fits, (28, 7))
    for size, near in ((30, 28), (3, 7), (0, 7), (-7, 7)):
        with pytest.raises(DataError, match=f"{size} px .* take {near}"):
            check_sizes(fits, (size,))

"""The picture of a comparison."""

from __future__ import annotations

from pathlib import Path

from matplotlib.image import imread

from bildung.tokenizer.measure import Measured
from bildung.tokenizer.plot import draw


def test_the_picture_grows_with_texts_and_has_a_third_panel_for_unknowns(tmp_path: Path) -> None:
    known, lost = Measured(1, 10, 50, 20, 0), Measured(1, 10, 50, 10, 5)
    draw({"en": {"$a$": known, "_b": known}}, tmp_path / "small.png")  # neither a formula nor hidden from the legend
    draw({"en": {"a": known, "b": lost}, "es": {"a": known, "b": lost}}, tmp_path / "large.png")
    draw({"en": {"a": known, "b": lost}, "es": {"a": known, "b": lost}}, tmp_path / "again.png")
    small, large = imread(tmp_path / "small.png"), imread(tmp_path / "large.png")
    assert large.shape[0] > small.shape[0] and large.shape[1] > small.shape[1]
    assert (tmp_path / "large.png").read_bytes() == (tmp_path / "again.png").read_bytes()

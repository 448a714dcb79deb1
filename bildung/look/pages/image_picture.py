"""Heat over an image: one small picture per head, layers down, heads across, and the mean of the heads at the end."""

# N layers, H heads, R rows and C columns of patches

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from bildung.look.pages.picture import DPI, FONT, INK, MUTED, drawable, save_figure

# From nothing to a strong orange: what is not looked at stays grey, and dark.
HEAT = LinearSegmentedColormap.from_list(
    "heat", [(0.75, 0.29, 0.07, 0.0), (0.95, 0.45, 0.05, 0.5), (1, 0.85, 0.1, 0.75)]
)
MOST_ROWS = 12  # of more layers, the last


def draw_image_attention(pixels_HWC: np.ndarray, probs_NHRC: np.ndarray, title: str, path: Path) -> None:
    """A PNG. Each map is scaled to its own largest value: what counts is where a head looks, not how much is left."""
    first = max(0, len(probs_NHRC) - MOST_ROWS)
    shown = np.concatenate((probs_NHRC, probs_NHRC.mean(1, keepdims=True)), axis=1)[first:]
    layers, heads = shown.shape[:2]
    height, width = pixels_HWC.shape[:2]
    side = 1.05
    figure = Figure(
        figsize=(side * (heads + 1) + 0.5, side * layers * height / width + 0.7), dpi=DPI, facecolor="white"
    )
    axes = figure.subplots(layers, heads + 1, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    grey = pixels_HWC.mean(-1) / 255
    for layer in range(layers):
        _image(axes[layer][0], pixels_HWC)
        for head in range(heads):
            axis = axes[layer][head + 1]
            axis.imshow(grey * 0.6, cmap="gray", vmin=0, vmax=1)
            values = shown[layer, head]
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            axis.imshow(values, cmap=HEAT, vmin=0, vmax=max(float(values.max()), 1e-9), extent=extent)
            _bare(axis)
        axes[layer][0].set_ylabel(f"layer {layer + first}", fontsize=7, color=MUTED, family=FONT)
    for axis in axes[1:, 0]:
        axis.images[0].set_visible(False)  # the image itself once, at the top
    for head in range(heads):
        name = f"head {head}" if head < heads - 1 else "mean"
        axes[0][head + 1].set_title(name, fontsize=7, color=MUTED, family=FONT, pad=3)
    figure.suptitle(drawable(title), fontsize=8, color=INK, family=FONT, x=0.02, y=0.995, ha="left", va="top")
    top = 1 - 0.42 / figure.get_figheight()
    figure.subplots_adjust(left=0.5 / figure.get_figwidth(), right=0.99, bottom=0.01, top=top)
    save_figure(figure, path)


def _image(axis: Axes, pixels_HWC: np.ndarray) -> None:
    axis.imshow(pixels_HWC)
    _bare(axis)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)

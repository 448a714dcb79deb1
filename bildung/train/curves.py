"""The curves of a run as a picture: losses, the gradient's norm, the learning rate, over the steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = (("loss", ("loss", "held_out_loss")), ("gradient norm", ("grad_norm",)), ("learning rate", ("lr",)))
NAMES = {"loss": "training", "held_out_loss": "held out"}


def draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Write a PNG of the lines of a log, whole or not at all."""
    from matplotlib.figure import Figure  # 0.5 s of imports; without pyplot, which keeps figures alive

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=(3, 1, 1))
    for axis, (label, names) in zip(axes, PANELS, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            style = "o-" if name.startswith("held_out") else "-"
            axis.plot([step for step, _ in points], [value for _, value in points], style, ms=3, label=NAMES.get(name))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    if skipped := [row["step"] for row in rows if row.get("skipped")]:
        for step in skipped:
            axes[1].axvline(step, color="tab:red", lw=0.8)
    axes[0].set_title(title)
    axes[0].legend()
    axes[-1].set_xlabel("step")
    being_written = path.with_name(f".{path.name}")
    figure.savefig(being_written, format="png", dpi=100)
    os.replace(being_written, path)

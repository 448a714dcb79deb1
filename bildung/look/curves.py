"""See how runs learned, side by side: training and held-out loss of each, and when it began to overfit.

    bildung look curves lives/regularisation/none OUT --runs lives/regularisation/l2 lives/regularisation/dropout

OUT gets curves.png and curves.json. Every panel has the same axes; the dashed line is the first run's lowest held-out
loss, so a panel shows at a glance whether its run did better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bildung.core.errors import DataError
from bildung.core.operation import Job, perform
from bildung.core.record import Record, hash_file
from bildung.core.settings import settings as settings_class
from bildung.look.pages.picture import DPI, FONT, INK, MUTED, RULE, drawable, save_figure
from bildung.train.history import METRICS, read_rows
from bildung.train.overfitting import overfitting

BLUE, ORANGE = "#1c69ad", "#bf4b12"
COLUMNS = 4


@settings_class
class Settings:
    """Curves of several runs."""

    runs: tuple[Path, ...] = ()  # what to compare the source with
    title: str = ""  # above the picture


@dataclass(frozen=True)
class Curves:
    """One run. trained: (step, mean training loss since the point before); held_out: (step, loss)."""

    name: str
    trained: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    overfitting: str | None

    @property
    def best(self) -> tuple[int, float]:
        """Step and value of the lowest held-out loss."""
        return min(self.held_out, key=lambda point: point[1])


def curves(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Draw the curves. Raises DataError for a directory without a training log or without held-out losses."""
    places = [Path(source), *settings.runs]

    def work(job: Job) -> None:
        found = [curves_of(place) for place in places]
        draw(found, job.out / "curves.png", settings.title)
        (job.out / "curves.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
        job.measured = {
            one.name: {
                "training_loss": one.trained[-1][1],
                "held_out_loss": one.held_out[-1][1],
                "held_out_loss_best": one.best[1],
                "best_step": one.best[0],
            }
            for one in found
        }
        job.notes += [f"{one.name}: {one.overfitting}" for one in found if one.overfitting]

    data = {str(place / METRICS): hash_file(place / METRICS) for place in places if (place / METRICS).is_file()}
    return perform("look curves", None, out, settings, work, data=data, force=force)


def curves_of(place: Path) -> Curves:
    """The curves of the run in a directory. Raises DataError when it has none."""
    if not (place / METRICS).is_file():
        raise DataError(f"{place} has no {METRICS}: it is not the result of a training run.")
    rows = read_rows(place, up_to_step=2**63)
    held = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    trained: list[tuple[int, float]] = []
    since: list[float] = []
    for row in rows:
        if "loss" in row:
            since.append(row["loss"])
        if "held_out_loss" in row and since:
            trained.append((row["step"], sum(since) / len(since)))
            since = []
    if len(held) < 2 or not trained:
        raise DataError(f"{place} has {len(held)} held-out losses; set held_out and evaluate_every to have a curve.")
    return Curves(place.name, trained, held, overfitting(rows))


def figure_size(runs: int) -> tuple[float, float]:
    """Width and height in inches of the picture of so many runs."""
    columns = min(COLUMNS, runs)
    return 2.9 * columns, 2.3 * math.ceil(runs / columns) + 0.4


def draw(runs: Sequence[Curves], path: Path, title: str = "") -> None:
    """A panel per run, as a PNG."""
    columns = min(COLUMNS, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure = Figure(figsize=figure_size(len(runs)), dpi=DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, run in zip(panels, runs, strict=False):
        _panel(panel, run, runs[0].best[1], first=run is runs[0])
    for panel in panels[len(runs) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(runs) - columns) : len(runs)]:
        panel.set_xlabel("step", fontsize=7, color=MUTED, family=FONT)
        panel.tick_params(labelbottom=True)
    if title:
        figure.suptitle(drawable(title), fontsize=9, color=INK, family=FONT, x=0.01, ha="left")
    save_figure(figure, path)


def _panel(axis: Axes, run: Curves, reference: float, first: bool) -> None:
    axis.axhline(reference, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.plot(*zip(*run.trained, strict=True), color=BLUE, linewidth=1.3, label="training")
    axis.plot(*zip(*run.held_out, strict=True), color=ORANGE, linewidth=1.6, label="held out")
    axis.plot(*run.best, marker="o", markersize=4, color=ORANGE)
    axis.annotate(
        f"{run.best[1]:.3f}",
        run.best,
        (0, -5),
        textcoords="offset points",
        fontsize=6.5,
        color=ORANGE,
        va="top",
        ha="center",
    )
    axis.set_title(drawable(run.name), fontsize=8, color=INK, loc="left", family=FONT, parse_math=False)
    axis.tick_params(length=0, labelsize=6, colors=MUTED)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(RULE)
    if first:
        axis.set_ylabel("nats per token", fontsize=7, color=MUTED, family=FONT)
        axis.legend(fontsize=6.5, frameon=False, labelcolor=INK)

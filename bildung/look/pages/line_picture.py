"""Pictures of numbers along an axis, one line per model, named at its end instead of in a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bildung.look.pages.picture import DPI, FONT, INK, MUTED, RULE, drawable, save_figure

# Told apart without colour vision too (Okabe & Ito 2008, without its yellow).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


@dataclass(frozen=True)
class Panel:
    """One pair of axes. lines: name -> (x, y). shaded: from this x on the ground is grey, and why. errors: name -> how
    far the band around a line reaches to both sides."""

    title: str
    x_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_y: bool = False
    log_x: bool = False  # equal steps are equal factors; every x is written at the axis
    y_limits: tuple[float, float] | None = None
    y_label: str = ""
    shaded: tuple[float, str] | None = None
    errors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    x_names: Mapping[float, str] = field(default_factory=dict)  # what is written at these places of the axis


def draw_lines(panels: Sequence[Panel], path: Path) -> None:
    """The panels side by side as a PNG."""
    figure = Figure(figsize=(5.4 * len(panels), 3.6), dpi=DPI, layout="constrained", facecolor="white")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axis, panel)
    save_figure(figure, path)


def _draw(axis: Axes, panel: Panel) -> None:
    ends = []
    for number, (name, (xs, ys)) in enumerate(panel.lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(xs, ys, color=colour, linewidth=1.4)
        if (error := panel.errors.get(name)) is not None:
            low, high = zip(*((y - e, y + e) for y, e in zip(ys, error, strict=True)), strict=True)
            axis.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
        ends.append((ys[-1], xs[-1], drawable(name), colour))
    if panel.log_y:
        axis.set_yscale("log")
    if panel.y_limits is not None:
        axis.set_ylim(*panel.y_limits)
    if panel.shaded is not None:
        start, why = panel.shaded
        axis.axvspan(start, max(max(xs) for xs, _ in panel.lines.values()), color="#f1eee8", linewidth=0, zorder=0)
        place = axis.get_xaxis_transform()
        axis.text(start, 0.98, f" {why}", fontsize=7, color=MUTED, family=FONT, va="top", transform=place)
    axis.set_title(drawable(panel.title), fontsize=8, color=INK, loc="left", family=FONT, parse_math=False)
    axis.set_xlabel(panel.x_label, fontsize=7.5, color=MUTED, family=FONT)
    axis.set_ylabel(panel.y_label, fontsize=7.5, color=MUTED, family=FONT)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M, not 2 and, in a corner, 1e6
    if all(float(x).is_integer() for xs, _ in panel.lines.values() for x in xs):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no layer 2.5
    if panel.log_x:
        places = sorted({x for xs, _ in panel.lines.values() for x in xs})
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, [f"{x:,.10g}" for x in places])
        axis.minorticks_off()
    if panel.x_names:
        axis.set_xticks(list(panel.x_names), list(panel.x_names.values()))
    axis.tick_params(length=2, labelsize=7, colors=MUTED)
    axis.grid(True, color=RULE, linewidth=0.4)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)
    _name(axis, ends)


def _name(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Each line's name to the right of the axes at the height where it ends, moved apart where they would overlap."""
    low, high = axis.transData.transform([(0, limit) for limit in axis.get_ylim()])[:, 1]
    height = axis.transData.transform([(0, y) for y, *_ in ends])[:, 1]
    share = ((height - low) / (high - low)).clip(0, 1)
    least, last = 0.055, -1.0
    for number in sorted(range(len(ends)), key=lambda number: share[number]):
        last = max(float(share[number]), last + least)
        _, _, name, colour = ends[number]
        place = axis.transAxes
        axis.text(
            1.01, last, name, fontsize=7, color=colour, family=FONT, parse_math=False, va="center", transform=place
        )

"""Small drawings in SVG: they take the page's colours, stay sharp on every screen and in print, and need no script.

`Markup.format` escapes every text; every drawing has a <title>, and points say their value when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 350, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 24


@dataclass(frozen=True)
class Curve:
    """One line of a chart. kind: "main" (thick), "raw" (thin, what the thick one smooths), "second"."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "main"


@dataclass(frozen=True)
class State:
    """One model in a small multiple: its place on the x axis, its value, and the place of the model it came from."""

    number: int
    name: str
    value: float
    stderr: float | None
    parent: int | None
    aside: bool = False  # not on the main line of the life


def line_chart(title: str, curves: Sequence[Curve], x_label: str = "step") -> Markup:
    """Curves over steps, with their names at their ends."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    frame = _Frame(min(xs), max(xs), min(ys), max(ys))
    parts = [frame.y_axis(), frame.x_axis(nice_ticks(min(xs), max(xs), 4), x_label)]
    for curve in curves:
        line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in curve.points)
        parts.append(Markup('<polyline class="curve {}" points="{}"/>').format(curve.kind, line))
        if len(curve.points) <= 40:
            parts += [
                _dot(frame, x, y, f"{curve.name}, {x_label} {x:g}: {short(y)}", curve.kind) for x, y in curve.points
            ]
    named = [curve for curve in curves if curve.kind != "raw"]
    if len(named) > 1:
        for place, curve in enumerate(named):
            at = Markup('<text class="label {}" x="{}" y="{}" text-anchor="end">{}</text>')
            parts.append(at.format(curve.kind, WIDTH - RIGHT, TOP + 10 + 15 * place, curve.name))
    return _svg(title, parts)


def states_chart(title: str, states: Sequence[State]) -> Markup:
    """One task along the life: value ± one standard error of every model, joined to the one it came from."""
    lows = [s.value - (s.stderr or 0) for s in states]
    highs = [s.value + (s.stderr or 0) for s in states]
    numbers = [s.number for s in states]
    frame = _Frame(min(numbers) - 0.4, max(numbers) + 0.4, min(lows), max(highs))
    parts = [frame.y_axis(), frame.x_axis([float(n) for n in numbers], "")]
    start = frame.y(states[0].value)
    parts.append(
        Markup('<line class="start" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(LEFT, WIDTH - RIGHT, y=start)
    )
    at = {s.number: s for s in states}
    for s in states:
        if s.parent in at:
            p = at[s.parent]
            line = f"{frame.x(p.number):.1f},{frame.y(p.value):.1f} {frame.x(s.number):.1f},{frame.y(s.value):.1f}"
            parts.append(
                Markup('<polyline class="curve {}" points="{}"/>').format("aside" if s.aside else "main", line)
            )
    for s in states:
        kind = "aside" if s.aside else "main"
        if s.stderr is not None:
            low, high = frame.y(s.value - s.stderr), frame.y(s.value + s.stderr)
            bar = Markup('<line class="error {}" x1="{x:.1f}" x2="{x:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
            parts.append(bar.format(kind, low, high, x=frame.x(s.number)))
        error = "" if s.stderr is None else f" ± {short(s.stderr)}"
        parts.append(_dot(frame, s.number, s.value, f"{s.number} {s.name}: {short(s.value)}{error}", kind))
    return _svg(title, parts)


def difference_bar(errors: float, better: bool | None) -> Markup:
    """A difference in units of its standard error, from -6 to 6; inside the grey band it may be chance."""
    x = 60 + 10 * max(-5.6, min(5.6, errors))
    kind = {True: "better", False: "worse", None: "unclear"}[better]
    title = f"{errors:+.1f} standard errors"
    return Markup(
        '<svg class="difference" viewBox="0 0 120 18" role="img"><title>{}</title>'
        '<rect class="band" x="40" y="1" width="40" height="16" rx="2"/>'
        '<line class="zero" x1="60" x2="60" y1="1" y2="17"/>'
        '<line class="{k}" x1="60" x2="{x:.1f}" y1="9" y2="9"/><circle class="{k}" cx="{x:.1f}" cy="9" r="4"/></svg>'
    ).format(title, k=kind, x=x)


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean of the last `window` values at every point (of fewer at the beginning)."""
    made, total = [], 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        made.append((x, total / min(i + 1, window)))
    return made


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between low and high, about so many."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Four significant digits at most, thousands apart."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.2e}"


class _Frame:
    """From numbers to places on the drawing."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float):
        room = (y_high - y_low) * 0.07 or abs(y_high) * 0.1 or 1.0
        self.x_low, self.x_high = (x_low, x_high) if x_high > x_low else (x_low - 1, x_high + 1)
        self.y_low, self.y_high = y_low - room, y_high + room

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def y_axis(self) -> Markup:
        made = Markup("")
        for tick in nice_ticks(self.y_low, self.y_high, 4):
            y = self.y(tick)
            line = Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>')
            made += line.format(LEFT, WIDTH - RIGHT, y=y)
            text = Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>')
            made += text.format(LEFT - 7, y + 4, short(tick))
        return made

    def x_axis(self, ticks: Iterable[float], label: str) -> Markup:
        made = Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
            LEFT - 7, HEIGHT - 7, label
        )
        for tick in ticks:
            text = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
            made += text.format(self.x(tick), HEIGHT - 7, short(tick))
        return made


def _dot(frame: _Frame, x: float, y: float, title: str, kind: str) -> Markup:
    dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>')
    return dot.format(kind, frame.x(x), frame.y(y), title)


def _svg(title: str, parts: Iterable[Markup]) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)
    return head + Markup("").join(parts) + Markup("</svg>")

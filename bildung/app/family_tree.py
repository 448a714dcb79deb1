"""The chain of operations as a drawing: a rail of numbered dots, side branches one lane to the right.

The drawing is the left margin of a list whose rows are all ROW pixels high, so dots and words stay side by side on
every screen. Reading order (app/chapters.py) puts a side branch right after what it came from; two lanes never cross.
"""

from __future__ import annotations

from markupsafe import Markup

from bildung.app.chapters import Chapter

ROW, LANE, RADIUS = 60, 30, 11


def draw(chapters: list[Chapter]) -> tuple[Markup, int]:
    """(the SVG, its width in pixels)."""
    lanes = lanes_of(chapters)
    width = LANE * (max(lanes.values(), default=0) + 1) + 6
    parts = [part for chapter in chapters for part in _rails(chapter, lanes)]
    for chapter in chapters:
        x, y = _place(chapter, lanes)
        dot = Markup(
            '<a href="#op-{n}"><circle class="stop" cx="{x}" cy="{y}" r="{r}"/><text x="{x}" y="{t}">{n}</text></a>'
        )
        parts.append(dot.format(n=chapter.number, x=x, y=y, t=y + 4, r=RADIUS))
    head = Markup('<svg class="tree" width="{}" height="{}" role="img" aria-label="{}">')
    steps = ", ".join(f"{c.number} {c.name}" + (f" from {c.parent.number}" if c.parent else "") for c in chapters)
    drawing = head.format(width, ROW * len(chapters), f"chain of operations: {steps}")
    return drawing + Markup("").join(parts) + Markup("</svg>"), width


def lanes_of(chapters: list[Chapter]) -> dict[int, int]:
    """{chapter's number: lane}. The last child goes on in its parent's lane, the others are side branches."""
    lanes: dict[int, int] = {}
    for chapter in chapters:
        if chapter.parent is None:
            lanes[chapter.number] = 0
        else:
            aside = chapter is not chapter.parent.children[-1]
            lanes[chapter.number] = lanes[chapter.parent.number] + aside
    return lanes


def _place(chapter: Chapter, lanes: dict[int, int]) -> tuple[int, int]:
    return RADIUS + 3 + LANE * lanes[chapter.number], ROW * (chapter.number - 1) + ROW // 2


def _rails(chapter: Chapter, lanes: dict[int, int]) -> list[Markup]:
    if not chapter.children:
        return []
    x, y = _place(chapter, lanes)
    _, end = _place(chapter.children[-1], lanes)
    rails = [Markup('<path class="rail" d="M{x} {}V{}"/>').format(y, end, x=x)]
    for child in chapter.children[:-1]:
        to_x, to_y = _place(child, lanes)
        rails.append(
            Markup('<path class="rail" d="M{x} {}C{x} {y} {x} {y} {} {y}"/>').format(to_y - ROW // 2, to_x, x=x, y=to_y)
        )
    return rails

"""A circuit drawn as a layered graph: the embedding below, the logits above, heads and MLPs in between.

Every layer has two rows, attention and MLP; heads keep their order from left to right. An edge's colour says which
input it goes into (q, k, v, an MLP, the logits), its width how large its score is; a dashed edge works against the
answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from bildung.look.circuit_file import Circuit, node_order
from bildung.look.graph import Graph
from bildung.look.page import look_page
from bildung.look.picture import DPI, FONT, INK, MUTED, RULE, save_figure

# Okabe & Ito's, told apart without colour vision too.
INPUTS = {"q": "#0072B2", "k": "#D55E00", "v": "#009E73", "mlp": "#CC79A7", "logits": "#56748c"}
WIDE, ROW, GAP = 900, 46, 64  # pixels: the drawing, between rows, least between nodes


@dataclass(frozen=True)
class Drawn:
    """Where everything stands, in pixels from the upper left."""

    places: dict[str, tuple[float, float]]
    edges: list[dict[str, Any]]
    width: float
    height: float


def layout(circuit: Circuit, graph: Graph) -> Drawn:
    """Rows that hold a node, from the embedding (below) to the logits; nodes spread by their number."""
    nodes = set(circuit.nodes) | {node for _, receiver in circuit.edges for node in graph.nodes_of(receiver)}
    nodes |= {"embed"}
    rows = sorted({node_order(node)[:2] for node in nodes})
    height = ROW * (len(rows) + 2)
    places = {"logits": (WIDE / 2, ROW * 0.7)}
    for number, row in enumerate(rows):
        members = sorted((node for node in nodes if node_order(node)[:2] == row), key=node_order)
        y = height - ROW * (number + 0.7)
        space = max(GAP, min(140, (WIDE - 160) / max(len(members), 1)))
        beside = 0 if row[1] == 0 else 34  # MLPs beside the middle: edges that pass by are seen
        for position, node in enumerate(members):
            places[node] = (WIDE / 2 + beside + (position - (len(members) - 1) / 2) * space, y)
    widest = max((abs(score) for score in circuit.edges.values() if score is not None), default=1.0) or 1.0
    worse = -1 if circuit.found.get("metric") == "kl" else 1  # cutting what helps raises KL, lowers the others
    edges: list[dict[str, Any]] = []
    for (sender, receiver), score in sorted(circuit.edges.items(), key=lambda item: abs(item[1] or 0)):
        for target in graph.nodes_of(receiver) or ["logits"]:
            share = 0.4 if score is None else math.sqrt(abs(score) / widest)
            edges.append(
                {
                    "from": sender,
                    "to": target,
                    "input": input_of(receiver),
                    "label": f"{sender} → {receiver}" + ("" if score is None else f": {score:+.3g}"),
                    "width": round(0.6 + 3.4 * share, 2),
                    "against": score is not None and score * worse > 0,
                    "path": _path(places[sender], places[target]),
                }
            )
    left = min(x for x, _ in places.values()) - 50
    right = max(x for x, _ in places.values()) + 50
    if left < 0 or right > WIDE:
        shift = -left
        places = {node: (x + shift, y) for node, (x, y) in places.items()}
        for edge in edges:
            edge["path"] = _path(places[edge["from"]], places[edge["to"]])
        return Drawn(places, edges, right - left, height)
    return Drawn(places, edges, WIDE, height)


def input_of(receiver: str) -> str:
    """Which kind of input a receiver is."""
    if receiver == "logits":
        return "logits"
    return "mlp" if receiver.startswith("m") else receiver[-1]


def _path(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    y1, y2 = y1 - 11, y2 + 11
    bend = max(18.0, abs(y1 - y2) * 0.45)
    return f"M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 - bend:.1f} {x2:.1f},{y2 + bend:.1f} {x2:.1f},{y2:.1f}"


def write_circuit(circuit: Circuit, graph: Graph, model: str, out: Path, command: str) -> None:
    """circuit.html, circuit.png and circuit.svg in `out`; `command` makes them again."""
    drawn = layout(circuit, graph)
    facts = [
        (name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else value)
        for name, value in circuit.measured.items()
        if value is not None
    ]
    ordered = sorted(circuit.edges.items(), key=lambda item: -abs(item[1] or 0))
    page = look_page(
        "circuit.html",
        script="circuit.js",
        model=model,
        command=command,
        found=circuit.found,
        facts=facts,
        drawn=drawn,
        inputs=INPUTS,
        table=[(u, r, "" if score is None else f"{score:+.4g}") for (u, r), score in ordered],
        count=len(circuit.edges),
    )
    (out / "circuit.html").write_text(page, encoding="utf-8")
    draw(drawn, f"{model}: {_headline(circuit)}", out)


def _headline(circuit: Circuit) -> str:
    measured, method = circuit.measured, circuit.found.get("method", "given")
    text = f"{method}, {len(circuit.edges)} edges"
    if "faithfulness" in measured:
        text += f", faithfulness {measured['faithfulness']:.2f}, without it {measured['without']:.2f}"
    return text


def draw(drawn: Drawn, title: str, out: Path) -> None:
    """The same graph as a PNG and an SVG."""
    figure = Figure(figsize=(drawn.width / 110, drawn.height / 110 + 0.3), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for edge in drawn.edges:
        (x1, y1), (x2, y2) = drawn.places[edge["from"]], drawn.places[edge["to"]]
        arrow = FancyArrowPatch(
            (x1, y1 - 9),
            (x2, y2 + 9),
            connectionstyle=f"arc3,rad={0.12 if x1 <= x2 else -0.12}",
            arrowstyle="-|>",
            mutation_scale=6,
            linewidth=edge["width"] * 0.55,
            linestyle=(0, (3, 2)) if edge["against"] else "-",
            color=INPUTS[edge["input"]],
            alpha=0.75,
        )
        axis.add_patch(arrow)
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": RULE, "linewidth": 0.8}
    for node, (x, y) in drawn.places.items():
        axis.text(x, y, node, ha="center", va="center", fontsize=6, color=INK, family=FONT, bbox=box)
    for number, (name, colour) in enumerate(INPUTS.items()):
        axis.text(6, 16 + number * 15, f"into {name}", fontsize=6, color=colour, family=FONT)
    axis.set_xlim(0, drawn.width)
    axis.set_ylim(drawn.height, 0)
    axis.axis("off")
    axis.set_title(title, fontsize=7.5, color=MUTED, loc="left", family=FONT, parse_math=False)
    save_figure(figure, out / "circuit.png")
    with matplotlib.rc_context({"svg.hashsalt": "bildung"}):  # the same drawing gives the same bytes
        figure.savefig(out / "circuit.svg", metadata={"Date": None, "Title": "bildung"})

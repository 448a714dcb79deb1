"""A circuit drawn as a layered graph: the embedding below, the logits above, heads and MLPs in between.

Every layer has two rows, attention and MLP; heads keep their order from left to right, MLPs stand in a column at the
right. An edge's colour says which input it goes into (q, k, v, an MLP, the logits), its width how large its score is;
a dashed edge works against the answer. A circuit of thousands of edges is drawn by its strongest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as MatplotlibPath

from bildung.look.graph.circuit_file import Circuit, node_order
from bildung.look.graph.graph import Graph, is_mlp
from bildung.look.pages.page import look_page
from bildung.look.pages.picture import DPI, FONT, INK, MUTED, RULE, save_figure

# Okabe & Ito's, told apart without colour vision too.
INPUTS = {"q": "#0072B2", "k": "#D55E00", "v": "#009E73", "mlp": "#CC79A7", "logits": "#56748c"}
WIDE, GAP = 900, 64  # pixels: the drawing, least between nodes
ROW, TALL = (30, 42), 1400  # pixels: between rows, the more the fewer there are; what they fill
DRAWN = 150  # edges, the strongest; of more only a blot would be seen


@dataclass(frozen=True)
class Drawn:
    """Where everything stands, in pixels from the upper left."""

    places: dict[str, tuple[float, float]]
    edges: list[dict[str, Any]]
    width: float
    height: float
    left_out: int  # weaker edges that are not drawn


def layout(circuit: Circuit, graph: Graph) -> Drawn:
    """Rows that hold a node, from the embedding (below) to the logits; heads to the left, MLPs in a column."""
    chosen = sorted(circuit.edges.items(), key=lambda item: -abs(item[1] or 0))[:DRAWN]
    writers = {sender for sender, _ in circuit.edges}
    ways = [(sender, receiver, score, _targets(receiver, graph, writers)) for (sender, receiver), score in chosen]
    nodes = (
        {next(iter(graph.senders))}
        | {sender for sender, *_ in ways}
        | {node for *_, targets in ways for node in targets}
    )
    rows = sorted({node_order(node)[:2] for node in nodes - {"logits"}})
    step = min(max(ROW[0], TALL / len(rows)), ROW[1])
    height = step * (len(rows) + 1.4)
    most = max(sum(node_order(node)[:2] == row for node in nodes - {"logits"}) for row in rows)
    width = max(WIDE, 300 + GAP * most)
    centre, mlps = (width - 180) / 2, width - 150
    places = {"logits": (centre, step * 0.7)}
    for number, row in enumerate(rows):
        members = sorted((node for node in nodes - {"logits"} if node_order(node)[:2] == row), key=node_order)
        y = height - step * (number + 0.7)
        space = min(140, (width - 300) / max(len(members), 1))
        for position, node in enumerate(members):
            places[node] = (mlps if row[1] == 2 else centre + (position - (len(members) - 1) / 2) * space, y)
    widest = max((abs(score) for score in circuit.edges.values() if score is not None), default=1.0) or 1.0
    worse = -1 if circuit.found.get("metric") == "kl" else 1  # cutting what helps raises KL, lowers the others
    edges: list[dict[str, Any]] = []
    for sender, receiver, score, targets in reversed(ways):  # the strongest on top
        for target in targets:
            share = 0.4 if score is None else math.sqrt(abs(score) / widest)
            edges.append(
                {
                    "from": sender,
                    "to": target,
                    "input": input_of(receiver),
                    "label": f"{sender} → {receiver}" + ("" if score is None else f": {score:+.3g}"),
                    "width": round(0.6 + 3.4 * share, 2),
                    "against": score is not None and score * worse > 0,
                    "points": _points(places[sender], places[target]),
                }
            )
            edges[-1]["path"] = "M{:.1f},{:.1f} C{:.1f},{:.1f} {:.1f},{:.1f} {:.1f},{:.1f}".format(
                *(number for point in edges[-1]["points"] for number in point)
            )
    return Drawn(places, edges, width, height, len(circuit.edges) - len(chosen))


def _targets(receiver: str, graph: Graph, writers: set[str]) -> list[str]:
    """The nodes an input is drawn into: of the heads that share keys and values those that write something."""
    nodes = graph.nodes_of(receiver) or ["logits"]
    return [node for node in nodes if node in writers] or nodes


def input_of(receiver: str) -> str:
    """Which kind of input a receiver is."""
    if receiver == "logits":
        return "logits"
    return "mlp" if is_mlp(receiver) else receiver[-1]


def _points(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """A Bézier curve between two nodes; within a column it makes way for the nodes between."""
    (x1, y1), (x2, y2) = start, end
    y1, y2 = y1 - 11, y2 + 11
    bend = max(18.0, abs(y1 - y2) * 0.45)
    aside = min(150.0, abs(y1 - y2) * 0.28) if abs(x1 - x2) < 1 and abs(y1 - y2) > ROW[1] else 0.0
    bend = bend / 2 if aside else bend
    return [(x1, y1), (x1 + aside, y1 - bend), (x2 + aside, y2 + bend), (x2, y2)]


def write_circuit(circuit: Circuit, graph: Graph, model: str, out: Path, command: str) -> None:
    """circuit.html, circuit.png and circuit.svg in `out`; `command` makes them again."""
    drawn = layout(circuit, graph)
    measured = circuit.measured
    facts = [
        (name, f"{value} of {measured[f'{name}_of']:,}" if f"{name}_of" in measured else f"{value:z.3f}")
        for name, value in measured.items()
        if value is not None and not name.endswith("_of")
    ]
    ordered = sorted(circuit.edges.items(), key=lambda item: -abs(item[1] or 0))
    page = look_page(
        "circuit.html",
        script="circuit.js",
        model=model,
        command=command,
        found={key: value for key, value in circuit.found.items() if key not in {"pairs", "tried"}},
        pairs=circuit.found.get("pairs"),
        tried=circuit.found.get("tried"),
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
        curve = MatplotlibPath(edge["points"], [MatplotlibPath.MOVETO, *[MatplotlibPath.CURVE4] * 3])
        arrow = FancyArrowPatch(
            path=curve,
            arrowstyle="-|>",
            mutation_scale=5,
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

"""Does a learning rate carry over to wider models? Loss by learning rate at three widths, with muP and without.

    python benchmarks/mup.py docs/images/mup.png

Yang et al. 2022 (arXiv 2203.03466), figure 1, on a CPU: a two-layer Llama of 64, 128 and 256 learns Moby-Dick byte by
byte for 80 steps of 1,024 tokens, at six learning rates, from two seeds. Under muP the base width is 64. About four
minutes of one core.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from bildung.data.batches import Batch, Example, Shuffled, pad
from bildung.data.text import documents
from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.train import mup
from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import adamw, linear

WIDTHS, BASE = (64, 128, 256), 64
RATES = [2.0**power for power in range(-10, -3)]
STEPS, LENGTH, ROWS, SEEDS = 80, 64, 16, (0, 1)
LAST = 20  # steps whose loss is averaged


def rows() -> list[Example]:
    """Moby-Dick's first chapters in rows of bytes."""
    text = "\n".join(documents("mini:moby")).encode()
    cut = [list(text[at : at + LENGTH]) for at in range(0, len(text) - LENGTH, LENGTH)]
    return [Example(row, [False] + [True] * (LENGTH - 1)) for row in cut]


def collate(examples: list[Example]) -> Batch:
    return pad(examples, None)


def final_loss(width: int, rate: float, maximal: bool, seed: int, examples: list[Example]) -> float:
    """Mean loss of the last steps, in nats per byte."""
    keys = dict(model_type="llama", vocab_size=256, hidden_size=width, intermediate_size=2 * width)
    keys |= dict(num_hidden_layers=2, num_attention_heads=width // 32, max_position_embeddings=LENGTH)
    model = build(from_dict({**keys, "tie_word_embeddings": False, "initializer_range": 0.1}), seed)
    optimizer: torch.optim.Optimizer = adamw(model, rate)
    if maximal:
        by_name = mup.factors(model, BASE)
        mup.start(model, by_name)
        optimizer = mup.at_rates(optimizer, model, by_name)
    batches = Shuffled(examples, ROWS, seed, collate)
    history = fit(model, batches, clm, optimizer, steps=STEPS, schedule=linear(STEPS, 8), clip=None, seed=seed)
    return sum(row["loss"] for row in history.rows[-LAST:]) / LAST


def main() -> None:
    torch.set_num_threads(1)
    examples = rows()
    panels = []
    for maximal in (False, True):
        lines = {}
        for width in WIDTHS:
            losses = [sum(final_loss(width, rate, maximal, seed, examples) for seed in SEEDS) / 2 for rate in RATES]
            best = RATES[min(range(len(RATES)), key=losses.__getitem__)]
            lines[f"width {width}"] = ([math.log2(rate) for rate in RATES], losses)
            name = "muP" if maximal else "standard"
            shown = ", ".join(f"{loss:.3f}" for loss in losses)
            print(f"{name}, width {width}: lowest at 2^{math.log2(best):.0f}; {shown}", flush=True)
        title = "muP: one learning rate for all widths" if maximal else "standard: every width wants its own"
        panels.append(Panel(title, "log2 of the learning rate", lines, y_label="nats per byte", y_limits=(2.2, 3.4)))
    draw_lines(panels, Path(sys.argv[1]))


if __name__ == "__main__":
    main()

"""The induction circuit of a model, and how it formed: a previous-token head, an induction head, and what joins them.

    bildung look induction MODEL OUT

    [A][B] ... [A] -> [B]      layer 0: at [B], a head looks one back and writes "after A"     (previous-token head)
                               layer 1: at the second [A], a head looks for "after A", finds [B], and copies it

Shown are the two heads by their scores on repeated random tokens (head_scores.py), how much the second reads what the
first wrote (K-composition above chance, composition.py), and the proof: every head of the layers before the induction
head is ablated in turn (replaced by its mean), and the induction score and the loss of the second stretch are measured.

OUT gets induction.json. Of a model trained with `pretrain causal --induction-every N`, induction.png shows it over the
steps of training: loss, scores, composition and what is left without the previous-token head, which change at the same
time (the "phase change" of Olsson et al. 2022). From Python: `circuit(lm)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bildung.core.errors import DataError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.asked import stack_prefix
from bildung.look.attention_heads.composition import baseline, composition_with
from bildung.look.attention_heads.head_scores import Repeats, head_scores, repeated_tokens, without_head
from bildung.look.attention_heads.head_weights import head_weights
from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.look.prompt import half
from bildung.model.base import CausalLM
from bildung.model.store import LanguageModel, load
from bildung.model.taps import intervene
from bildung.train.history import METRICS, read_rows

LOGGED = "induction/"  # what names in a training log begin with


@settings_class
class Settings:
    """The induction circuit."""

    stretch: int | None = None  # distinct random tokens, which come twice; default: 50, or what the context can hold
    rows: int = 32  # such rows
    seed: int = 0  # of the tokens


def induction(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Find and test the circuit. Raises DataError for models without attention, or too small a vocabulary."""

    def work(job: Job) -> None:
        found = circuit(load(source), settings)
        rows = read_rows(Path(source), up_to_step=2**63) if (Path(source) / METRICS).is_file() else []
        course = [row for row in rows if LOGGED + "score" in row]
        (job.out / "induction.json").write_text(json.dumps(found | {"course": course}, indent=1) + "\n", "utf-8")
        if len(course) > 1:
            draw(rows, course, job.out / "induction.png")
        else:
            job.notes.append("no picture: the model's training was not watched (pretrain causal --induction-every N)")
        job.measured = {name: value for name, value in found.items() if not isinstance(value, list)}
        print(shown(found))

    return perform("look induction", source, out, settings, work, force=force)


def circuit(lm: LanguageModel, settings: Settings | None = None) -> dict[str, Any]:
    """The two heads, their figures, and under "ablations" what each earlier head is worth. Raises DataError."""
    lm = continuing(lm)
    repeats = repeats_for(lm, settings or Settings())
    found = figures(lm, repeats)
    layer, head = found["induction_head"]
    found["ablations"] = []
    for number in range(layer):
        for other in range(lm.config.num_attention_heads):
            with intervene(lm.model, without_head(number, other, stack_prefix(lm.model))):
                seen = head_scores(lm, repeats)
            score, loss = float(seen.scores["induction"][layer, head]), seen.stretch_loss(1)
            found["ablations"].append({"layer": number, "head": other, "score": score, "second_loss": loss})
    return found


def figures(lm: LanguageModel, repeats: Repeats) -> dict[str, Any]:
    """The strongest induction head, the strongest previous-token head below it, and how they depend on each other.

    score            of the induction head                       previous_token   of the previous-token head
    first_loss       nats of tokens that come for the first time second_loss      for the second
    in_context       their difference                            k_composition    of the two heads, above chance
    score_without, second_loss_without                           with the previous-token head ablated
    """
    lm = continuing(lm)
    layers = head_weights(lm.model)
    seen = head_scores(lm, repeats, layers)
    layer, head = seen.strongest("induction")
    found: dict[str, Any] = {
        "induction_head": [layer, head],
        "score": float(seen.scores["induction"][layer, head]),
        "first_loss": seen.stretch_loss(0),
        "second_loss": seen.stretch_loss(1),
        "in_context": seen.in_context,
    }
    if layer == 0:  # nothing is below it that it could read
        return found
    before = seen.strongest("previous token", layer)
    with intervene(lm.model, without_head(*before, stack_prefix(lm.model))):
        without = head_scores(lm, repeats, layers)
    joined = composition_with(layers, before, ("K",))["K"]
    return found | {
        "previous_head": list(before),
        "previous_token": float(seen.scores["previous token"][before]),
        "k_composition": float(joined[layer, head]) - baseline(lm.config.hidden_size),
        "score_without": float(without.scores["induction"][layer, head]),
        "second_loss_without": without.stretch_loss(1),
    }


def continuing(lm: LanguageModel) -> LanguageModel:
    """What of a model continues text: itself, or its decoder. Raises DataError for one that does not."""
    lm = half(lm, "decoder")
    if not isinstance(lm.model, CausalLM):
        raise DataError(f"a {lm.config.model_type} of kind {lm.config.kind!r} does not continue text.")
    return lm


def check(lm: LanguageModel) -> None:
    """Raises DataError for a model that the circuit cannot be looked for in."""
    head_weights(lm.model)
    repeats_for(lm, Settings())


def watched(lm: LanguageModel) -> dict[str, float]:
    """The same for the log of a training run."""
    was_training = lm.model.training
    lm.model.eval()
    found = figures(lm, repeats_for(lm, Settings()))
    lm.model.train(was_training)
    return {LOGGED + name: value for name, value in found.items() if isinstance(value, float)}


def repeats_for(lm: LanguageModel, given: Settings) -> Repeats:
    """The rows of random tokens. Raises DataError for too small a vocabulary."""
    room = (lm.config.max_position_embeddings - 1) // 2
    return repeated_tokens(lm, stretch=given.stretch or min(50, room), rows=given.rows, seed=given.seed)


def shown(found: Mapping[str, Any]) -> str:
    """The circuit in a few lines."""
    layer, head = found["induction_head"]
    lines = [
        f"induction head {layer}.{head}: {found['score']:.3f}; loss of random tokens {found['first_loss']:.2f} nats at "
        f"first, {found['second_loss']:.2f} the second time"
    ]
    if "previous_head" in found:
        before, other = found["previous_head"]
        lines.append(
            f"previous-token head {before}.{other}: {found['previous_token']:.3f}; K-composition of the two, above "
            f"chance: {found['k_composition']:+.3f}"
        )
    for one in found["ablations"]:
        lines.append(
            f"  without {one['layer']}.{one['head']}: induction {one['score']:.3f}, loss the second time "
            f"{one['second_loss']:.2f}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], course: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Four panels over the steps of training."""

    def line(name: str, of: Sequence[Mapping[str, Any]] = course) -> tuple[list[float], list[float]]:
        there = [row for row in of if name in row]
        return [row["step"] for row in there], [row[name] for row in there]

    losses = {"training": line("loss", rows)}
    if any("held_out_loss" in row for row in rows):
        losses["held out"] = line("held_out_loss", rows)
    names = {"first time": "first_loss", "second time": "second_loss", "without 1st head": "second_loss_without"}
    scores = {"induction": "score", "previous token": "previous_token", "without it": "score_without"}
    panels = [
        Panel("loss of the text it learns from", "step", losses, y_label="nats per token"),
        Panel("loss of random tokens that come twice", "step", _there(names, line), y_label="nats per token"),
        Panel("scores of the two heads", "step", _there(scores, line), y_limits=(0.0, 1.0)),
        Panel("K-composition above chance", "step", _there({"of the two heads": "k_composition"}, line)),
    ]
    draw_lines([panel for panel in panels if panel.lines], path)


def _there(names: Mapping[str, str], line: Any) -> dict[str, Any]:
    lines = {shown: line(LOGGED + name) for shown, name in names.items()}
    return {shown: points for shown, points in lines.items() if points[0]}

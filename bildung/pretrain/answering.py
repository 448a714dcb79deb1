"""Answers to held-out sources, scored beside those of two answerers that know nothing.

    copy_source     the source itself as the answer
    most_frequent   the same answer to everything: the most frequent target of the training rows

A score of a small task says nothing alone: on catalog strings copying the source gave BLEU 8.1 where a small model
reached 1.1.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bildung.data.seq2seq import SourceTarget
from bildung.evaluate.metrics import as_json
from bildung.evaluate.sequence_metrics import SEQUENCE_METRICS, by_length, measure_corpus
from bildung.model.store import LanguageModel
from bildung.run.beam import Beam
from bildung.run.write import write

METRICS = (*SEQUENCE_METRICS, "exact_match")
AT_ONCE = 64  # sources answered together


def answers_to(lm: LanguageModel, ids: Sequence[Sequence[int]], new_tokens: int, beams: int = 1) -> list[str]:
    """The answer to each source (token ids), greedily or by beam search; sources of similar length go together."""
    new_tokens = min(new_tokens, lm.config.max_position_embeddings - 1)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    answers = [""] * len(ids)
    for at in range(0, len(order), AT_ONCE):
        numbers = order[at : at + AT_ONCE]
        written = write(lm.model, lm.tokenizer, [ids[number] for number in numbers], new_tokens, beam=Beam(beams=beams))
        for number, one in zip(numbers, written, strict=True):
            answers[number] = one[0].text
    return answers


def scored(
    metrics: Sequence[str],
    answers: Sequence[str],
    asked: Sequence[SourceTarget],
    learned: Sequence[SourceTarget],
    lengths: Sequence[int],
    edges: Sequence[int] = (),
) -> dict[str, Any]:
    """Figures for the record: each metric with its standard error, both baselines and its signature; with `edges`, also
    by range of source length. Says them aloud."""
    targets = [one.target for one in asked]
    usual = Counter(one.target for one in learned).most_common(1)[0][0]
    knowing_nothing = {"copy_source": [one.source for one in asked], "most_frequent": [usual] * len(asked)}
    found: dict[str, Any] = {"answered": len(asked), "signatures": {}}
    for name in metrics:
        whole = _measure(name, answers, targets)
        found |= {name: whole["value"], f"{name}_stderr": whole["stderr"]}
        found["signatures"][name] = whole["signature"]
        said = [f"{name} {whole['value']:.4g} of {len(asked)} answers"]
        for baseline, others in knowing_nothing.items():
            found[f"{name}_{baseline}"] = value = _measure(name, others, targets)["value"]
            said.append(f"{baseline.replace('_', ' ')} {value:.4g}")
        if edges and name in SEQUENCE_METRICS:
            parts = by_length(name, answers, targets, lengths, edges)
            found |= {f"{name}, length {label}": part["value"] for label, part in parts.items()}
            said += [f"length {label} {part['value']:.4g}" for label, part in parts.items()]
        print(f"  {', '.join(said)}", file=sys.stderr)
    return found


def _measure(name: str, answers: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
    if name != "exact_match":
        return measure_corpus(name, answers, targets)
    items = [float(a.split() == b.split()) for a, b in zip(answers, targets, strict=True)]
    return as_json(name, items) | {"signature": "nrefs:1|case:mixed|unit:answers|space:any"}

"""A head on a model, as transformers' ...ForSequenceClassification has it, in place of the heads that it had.

    decoder: unembedding -> score               encoder: masked-language head ... -> (pooler and) classifier

config.json names the classes (id2label), and what the head's numbers mean (problem_type).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bildung.core.operation import Job
from bildung.data.labelled import Problem
from bildung.model.adapter_head import HEADS, headed
from bildung.model.build import build, make
from bildung.model.config import from_dict
from bildung.model.linear import Dense, Linear
from bildung.model.store import LanguageModel

PROBLEM_TYPE = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


def with_classifier(
    job: Job, lm: LanguageModel, classes: Sequence[str], seed: int, problem: Problem = "single_label"
) -> LanguageModel:
    """The model with a head for these classes; a head for the same ones is kept. Other heads are left out.

    Its layers are those of `lm`, in float32; what is quantized there stays so, and never is whole in memory otherwise.
    problem: what the head's numbers mean; config.json says it, and transformers takes its loss from there.
    """
    dequantize_head(lm.model)
    known, means = (
        lm.config.raw.get("id2label") or {},
        lm.config.raw.get("problem_type") or PROBLEM_TYPE["single_label"],
    )
    names = {str(number): name for number, name in enumerate(classes)}
    if (
        known == names
        and means == PROBLEM_TYPE[problem]
        and any(getattr(lm.model, head, None) is not None for head in ("classifier", "score"))
    ):
        return lm
    config = headed(lm.config, names, PROBLEM_TYPE[problem])
    if lm.config.kind != "encoder" and lm.tokenizer.pad_id is not None:
        # transformers finds the last token by it
        config = from_dict({"pad_token_id": lm.tokenizer.pad_id, **config.raw})
    with torch.device("meta"):
        wanted = dict(make(config).named_parameters())
    own, theirs = lm.model.linears(), dict(lm.model.named_parameters(remove_duplicate=False))
    there = {*theirs, *(f"{name}.base.weight" for name in own)}  # what is quantized has no parameter
    kept = {name for name in wanted if name in there and not name.startswith(("classifier.", "score."))}
    model = build(config, seed, only=lambda name: name not in kept)
    for name, linear in model.linears().items():
        if name in own and not isinstance(own[name].base, Dense):
            linear.base = own[name].base  # as it is stored
        if name in own and not name.startswith(HEADS):
            linear.deltas = own[name].deltas  # of an adapter
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        taken = theirs[name].detach().float() if name in kept else parameter.detach().to(lm.model.device)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(taken))
    fresh = sorted({name.partition(".")[0] for name in wanted if name not in kept})
    gone = sorted({name.partition(".")[0] for name in theirs if name not in wanted and ".deltas." not in name})
    job.notes.append(f"started at random: {', '.join(fresh)}" + (f"; left out: {', '.join(gone)}" if gone else ""))
    return replace(lm, model=model, config=config)


def outer_matrix(model: Any) -> Linear | None:
    """Of a text classifier: the matrix that has a row for each class."""
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head if isinstance(head, Linear) else getattr(head, "out_proj", None)


def dequantize_head(model: Any) -> None:
    """The head's matrices (BERT's pooler among them) as floating-point numbers, which can train."""
    for name, linear in model.linears().items():
        if name.startswith(HEADS) and not isinstance(linear.base, Dense):
            linear.base = Dense(nn.Parameter(linear.base.dense().detach().float()))

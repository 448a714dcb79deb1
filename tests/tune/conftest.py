"""Conversations and settings small enough to tune the tiny model in a second."""

from __future__ import annotations

import json

import pytest
import torch

import bildung
from bildung.data.batches import clm_examples, pad
from bildung.train.fit import fit
from bildung.train.objectives import clm

GENERAL = "The capital of France is Paris. The capital of Germany is Berlin, in the middle of the country."
CONVERSATIONS = [
    ("What is the capital of France?", "Paris."),
    ("What is the capital of Germany?", "Berlin, on the river Spree."),
    ("Name a colour.", "Red."),
    ("Count to three.", "One, two, three."),
    ("Say something long.", "The capital of Italy is Rome. " * 4),
    ("Say nothing much.", "Hm."),
]


@pytest.fixture
def data(tmp_path):
    """A file of six conversations in OpenAI's form, and one row that cannot be used."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in CONVERSATIONS
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": []}]), encoding="utf-8")
    return str(path)


@pytest.fixture
def given(data):
    """Keyword arguments of small, exact settings."""
    return dict(data=data, max_length=96, batch_size=2, steps=3, learning_rate=1e-2, precision="fp32")


@pytest.fixture
def logits():
    """logits(lm) -> logits of one fixed prompt, in the model's dtype."""

    def of(lm):
        tokens_BL = torch.tensor([lm.tokenizer.encode("The capital of France is")])
        with torch.no_grad():
            return lm.model(tokens_BL)

    return of


@pytest.fixture
def general(tmp_path):
    """Prose that the tuning data is not about."""
    path = tmp_path / "general.jsonl"
    path.write_text("\n".join([json.dumps({"text": GENERAL})] * 3), encoding="utf-8")
    return str(path)


@pytest.fixture
def source(tiny_lm, general, tmp_path):
    """The tiny model after it has learned that prose: something to lose."""
    pieces = clm_examples(tiny_lm.tokenizer, [GENERAL], 64)
    batch = pad(pieces, tiny_lm.tokenizer.pad_id)
    tiny_lm.model.requires_grad_(True)
    fit(tiny_lm.model, lambda n: batch, clm, torch.optim.AdamW(tiny_lm.model.parameters(), 1e-2), steps=25)
    return bildung.save(tiny_lm, tmp_path / "source")

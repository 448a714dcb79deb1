"""Preference pairs small enough to train the tiny model on in a second."""

from __future__ import annotations

import json

import pytest
import torch

from bildung.align.preference import Pairs
from bildung.data.batches import pair_examples
from bildung.data.pairs import preference_pairs

PAIRS = [
    ("What is the capital of France?", "Paris.", "I do not know, ask somebody else."),
    ("What is the capital of Germany?", "Berlin, on the river Spree.", "Rome."),
    ("Name a colour.", "Red.", "Seven."),
    ("Count to three.", "One, two, three.", "Three, one. " * 3),
    ("Say something long.", "The capital of Italy is Rome. " * 3, "No."),
    ("Say nothing much.", "Hm.", "The capital of Spain is Madrid."),
]


@pytest.fixture
def data(tmp_path):
    """A file of six pairs and one row that cannot be used."""
    rows = [{"prompt": question, "chosen": good, "rejected": bad} for question, good, bad in PAIRS]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "?", "chosen": "!"}]))
    return str(path)


@pytest.fixture
def given(data):
    """Keyword arguments of small, exact settings."""
    return dict(data=data, max_length=96, batch_size=2, steps=3, learning_rate=1e-2, precision="fp32", rank=2)


@pytest.fixture
def examples(data, tiny_lm):
    """The six pairs as token ids."""
    return pair_examples(tiny_lm.tokenizer, preference_pairs(data), 96)


@pytest.fixture
def pairs(examples, tiny_lm):
    """The six pairs, ready to be batched."""
    return Pairs(examples, tiny_lm.tokenizer.pad_id)


@pytest.fixture
def logits():
    """logits(lm) -> logits of one fixed prompt."""

    def of(lm):
        with torch.no_grad():
            return lm.model(torch.tensor([lm.tokenizer.encode("The capital of France is")]))

    return of

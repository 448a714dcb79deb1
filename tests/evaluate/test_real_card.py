"""SmolLM2's card: numbers that a mistake in prompts, spaces or BOS would spoil."""

from __future__ import annotations

import pytest

import bildung
from bildung.evaluate.card import CardSettings, card
from tests.tokens.samples import real_gguf


@pytest.mark.real
def test_smollm2_knows_what_it_should():
    tasks = ("capitals", "elements", "prose", "sentiment_mini", "instructions_mini")
    made = card(bildung.load(real_gguf()), CardSettings(tasks=tasks, limit=40, sample_tokens=12))
    values = {name: entry["value"] for name, entry in made["tasks"].items()}
    assert values["capitals"] > 0.5 and values["elements"] > 0.7  # chance is 0.25
    assert values["sentiment_mini"] > 0.6  # chance is 0.5
    assert values["prose"] < 150 and values["instructions_mini"] < 15
    assert "Paris" in made["samples"][0]["answer"]

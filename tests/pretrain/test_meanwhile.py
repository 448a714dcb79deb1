"""Cards and samples while a model learns: in the log, on the page, and refused beforehand where they cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bildung
from bildung.core.errors import BildungError, SettingsError
from bildung.evaluate.card import CardSettings
from bildung.pretrain.causal import Settings, causal
from bildung.pretrain.meanwhile import check_looks
from bildung.train.history import METRICS
from bildung.train.live_page import NAME
from tests.pretrain.test_size import MODEL

CARD = CardSettings(tasks=("capitals",), limit=3, sample_prompts=(), context=48, dtype="float32")


@pytest.fixture
def given(tmp_path: Path) -> dict[str, object]:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"number {n} follows {n - 1}"}) for n in range(60)))
    common = {"data": str(text), "model": json.dumps(MODEL), "max_length": 32, "batch_size": 2, "held_out": 4}
    return {**common, "steps": 6, "precision": "fp32"}


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def test_cards_and_samples_in_the_course(tokenizer_directory: Path, given: dict, tmp_path: Path) -> None:
    more = {"card": CARD, "card_every": 4, "sample_prompts": ("number",), "sample_every": 3, "sample_tokens": 4}
    out = tmp_path / "model"
    record = causal(tokenizer_directory, out, Settings(**given, **more))
    rows = log(out)
    assert [row["step"] for row in rows if "card/capitals" in row] == [4, 6]
    assert [row["step"] for row in rows if "samples" in row] == [3, 6]
    assert record.after["tasks"]["capitals"]["value"] == rows[-1]["card/capitals"]
    assert record.after["samples"][0]["prompt"] == "number"
    assert "card/capitals" in (out / NAME).read_text()
    # Looking changes nothing: the same weights as without.
    causal(tokenizer_directory, tmp_path / "blind", Settings(**given))
    one, two = (bildung.load(place).model.state_dict() for place in (out, tmp_path / "blind"))
    assert all(bool((one[name] == two[name]).all()) for name in one)


def test_a_card_that_cannot_be_measured_is_refused_before_training(
    tokenizer_directory: Path, given: dict, tmp_path: Path
) -> None:
    card = CardSettings(tasks=("capitels",))
    with pytest.raises(BildungError, match="capitals"):
        causal(tokenizer_directory, tmp_path / "model", Settings(**given, card=card))
    assert not (tmp_path / "model.partial").exists()


def test_heads_that_lie_on_several_ranks_are_not_looked_at(tiny_lm: bildung.LanguageModel, given: dict) -> None:
    with pytest.raises(SettingsError, match="each rank has some"):
        check_looks(tiny_lm, Settings(**given, induction_every=2, parallel="tensor"))

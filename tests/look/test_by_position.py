"""`bildung look by_position`: numbers equal to a loss taken by hand, tables that end, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.app.planning.passing import looked
from bildung.core.errors import DataError, SettingsError
from bildung.look.by_position import Settings, by_position
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from tests.model.tiny import tiny_lm

TEXT = "The whale swam on and on under a sky that was as wide as the sea itself. " * 3


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    rows = ["not to be read: " + "x" * 300, *(f"{number} {TEXT}" for number in range(6)), "short"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def saved(place: Path, positions: str, **changes: Any) -> Path:
    raw: dict[str, Any] = dict(
        model_type="bildung", vocab_size=260, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=256, eos_token_id=257, positions=positions, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    config = from_dict({**raw, **changes})
    return bildung.save(LanguageModel(build(config).eval(), tiny_lm().tokenizer, config), place / positions)


def test_numbers_and_picture(text: str, tmp_path: Path) -> None:
    first, others = saved(tmp_path, "rope"), (saved(tmp_path, "learned"), saved(tmp_path, "integer"))
    settings = Settings(data=text, skip=1, others=others, length=64, rows=4, trained=16, bins=8)
    record = by_position(first, tmp_path / "out", settings)
    numbers = json.loads((tmp_path / "out/by_position.json").read_text())
    assert (tmp_path / "out/by_position.png").read_bytes().startswith(b"\x89PNG")
    by_name = {one["name"]: one for one in numbers["models"]}
    assert {name: len(one["loss"]) for name, one in by_name.items()} == {"rope": 8, "learned": 2, "integer": 8}
    assert by_name["learned"]["beyond"] is None and by_name["integer"]["positions"] == "integer"
    (planned,) = looked("look by_position", first, {"data": text, "others": others, "length": 64, "rows": 4})
    assert planned.parts["logits"] > 4 * 64 * 260 * 4  # the table that ends at 16 is no reason not to plan
    # By hand: no tokens of the skipped document, pieces of 64 tokens that share one.
    lm = bildung.load(first)
    rows = []
    for row in Path(text).read_text().splitlines()[1:]:
        tokens = [*lm.tokenizer.encode(json.loads(row)["text"]), 257]
        rows += [tokens[i : i + 64] for i in range(0, len(tokens), 63) if len(tokens[i : i + 64]) == 64]
    kept = torch.tensor(rows[:: len(rows) // 4][:4])
    logprobs = lm.model(kept)[:, :-1].log_softmax(-1).gather(-1, kept[:, 1:, None])[..., 0]
    expected = -logprobs.mean(0)
    assert abs(by_name["rope"]["within"] - expected[:15].mean().item()) < 1e-5
    assert abs(by_name["rope"]["beyond"] - expected[15:].mean().item()) < 1e-5
    assert abs(by_name["rope"]["loss"][3] - expected[24:32].mean().item()) < 1e-5
    assert record.measured["rope"]["within"] == by_name["rope"]["within"]


def test_what_cannot_be_compared_is_refused(text: str, tmp_path: Path) -> None:
    first = saved(tmp_path, "rope")
    for changes, error, words in (
        (dict(trained=None), SettingsError, "give `trained`"),
        (dict(length=1000), DataError, "no document .* has 1000 tokens"),
        (dict(skip=100), DataError, "leaves nothing"),
        (dict(bins=40), SettingsError, "bins lies between"),
        (dict(others=(first,)), SettingsError, "the same name"),
    ):
        given: dict[str, Any] = {**dict(data=text, length=64, trained=16), **changes}
        with pytest.raises(error, match=words):
            by_position(first, tmp_path / "out", Settings(**given))

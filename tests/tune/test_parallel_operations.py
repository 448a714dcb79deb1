"""Whole operations on two processes: what they leave is what one process leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bildung
from bildung.core.record import read_record
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import replace_stores
from bildung.model.nf4 import Nf4
from bildung.model.store import LanguageModel
from bildung.train.history import METRICS
from tests.conftest import CONFIG, tiny_tokenizer
from tests.model.tiny_encoder import tiny_encoder
from tests.processes import torchrun
from tests.tune import parallel_operations

# Of 64 columns at least for each of two ranks, which NF4's blocks want.
WIDE = {**CONFIG, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
pytestmark = pytest.mark.slow
CASES = [(name, way) for name, (*_, ways) in parallel_operations.operations(Path()).items() for way in ways]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("operations")
    parallel_operations.write_inputs(place)
    for name in ("lm", "nf4"):
        lm = LanguageModel(build(from_dict(WIDE), seed=3).eval(), tiny_tokenizer(), from_dict(WIDE))
        if name == "nf4":
            replace_stores(lm.model, "all", lambda linear: Nf4.quantize(linear.base.dense()))
        bildung.save(lm, place / name)
    bildung.save(tiny_encoder("BertModel"), place / "encoder")
    (place / "words").mkdir()
    tiny_tokenizer().save(place / "words")
    parallel_operations.main(place)
    done = torchrun("-m", "tests.tune.parallel_operations", str(place), timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return place


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_same_directory(place: Path, name: str, way: str) -> None:
    alone, together = place / f"{name} none", place / f"{name} {way}"
    files = {path.name for path in alone.iterdir()}
    assert {path.name for path in together.iterdir()} == files
    for file in files:
        if file.endswith(".safetensors"):
            one, other = load_file(alone / file), load_file(together / file)
            assert one.keys() == other.keys()
            for tensor in one:
                torch.testing.assert_close(other[tensor], one[tensor], atol=1e-5, rtol=0)
    assert not list(place.glob("*.partial"))


def test_samples_and_cards_in_the_course_come_from_cut_matrices(place: Path) -> None:
    logs = [(place / f"birth {way}" / METRICS).read_text().splitlines() for way in ("none", "tensor")]
    alone, together = ([json.loads(line) for line in log] for log in logs)
    for key in ("samples", "card/capitals"):
        found = [row[key] for row in together if key in row]
        assert found == [row[key] for row in alone if key in row] and len(found) == 2


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_record_says_what_a_rank_holds_and_sends(place: Path, name: str, way: str) -> None:
    record, alone = read_record(place / f"{name} {way}"), read_record(place / f"{name} none")
    assert record is not None and alone is not None
    assert record.measured["sent_bytes_per_step"] > 0
    held = record.measured["held_bytes_per_rank"]
    assert set(held) == {"weights", "gradients", "optimizer"}
    if way != "ddp":
        assert record.measured["optimizer_bytes"] == held["optimizer"] < 0.85 * alone.measured["optimizer_bytes"]
    assert record.tokens_seen == alone.tokens_seen and record.trained_tokens == alone.trained_tokens

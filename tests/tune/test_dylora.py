"""DyLoRA: every rank of one training works by itself, and is cut out as it was."""

from __future__ import annotations

import json

import pytest
import torch

import bildung
from bildung.core.errors import AdapterError, SettingsError
from bildung.model.nested import Nested, use_rank
from bildung.tune.cut import Settings as CutSettings
from bildung.tune.cut import cut, cut_ranks
from bildung.tune.dylora import Options, Settings, add_dylora, dylora, rank_at
from bildung.tune.lora import Settings as LoraSettings
from bildung.tune.lora import lora

TOKENS = torch.tensor([[5, 60, 7, 101, 33, 250]])


def randomised(model, **options):
    torch.manual_seed(1)
    chosen = add_dylora(model, Options(**options))
    for linear in chosen.values():
        torch.nn.init.normal_(linear.deltas["dylora"].lora_B, std=0.2)
    return chosen


def test_rank_b_is_the_first_b_ranks_scaled_by_alpha_over_b():
    """Equation 7, for every b."""
    delta = Nested(12, 9, 6, 5.0)
    torch.nn.init.normal_(delta.lora_B)
    x, y = torch.randn(2, 3, 12), torch.randn(2, 3, 9)
    for b in range(1, 7):
        delta.use(b)
        expected = y + 5 / b * x @ delta.lora_A[:b].T @ delta.lora_B[:, :b].T
        torch.testing.assert_close(delta(x, y), expected)
    with pytest.raises(SettingsError, match="1 to 6"):
        delta.use(7)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_rank_that_is_cut_out_equals_that_rank_in_the_model(tiny_lm_directory, given, tmp_path, rank):
    settings = Settings(**given, rank=4, alpha=6, held_out=2)
    record = dylora(tiny_lm_directory, tmp_path / "dylora", settings)
    lm = bildung.load(tiny_lm_directory)
    chosen = add_dylora(lm.model, settings)
    saved = bildung.load(tmp_path / "dylora")
    for name, linear in chosen.items():
        trained = saved.model.linears()[name].deltas["default"]
        linear.deltas["dylora"].lora_A, linear.deltas["dylora"].lora_B = trained.lora_A, trained.lora_B
    lm.model.eval()
    use_rank(lm.model, rank)
    cut(tmp_path / "dylora", tmp_path / "cut", CutSettings(rank=rank))
    piece = bildung.load(tmp_path / "cut")
    with torch.no_grad():
        torch.testing.assert_close(piece.model(TOKENS), lm.model(TOKENS), atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "cut/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, 6)
    assert list(record.measured["held_out_loss_by_rank"]) == [1, 2, 3, 4]
    assert (tmp_path / "dylora/loss_by_rank.png").read_bytes().startswith(b"\x89PNG")
    assert (piece.model(TOKENS) - bildung.load(tiny_lm_directory).model(TOKENS)).abs().max() > 1e-3


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_a_rank(tiny_lm, frozen):
    """All of the first b ranks learn, of frozen only number b; nothing beyond."""
    chosen = randomised(tiny_lm.model, rank=5, frozen=frozen)
    tiny_lm.model.train()
    use_rank(tiny_lm.model, 3)
    tiny_lm.model(TOKENS).square().sum().backward()
    for linear in chosen.values():
        delta = linear.deltas["dylora"]
        moved = [bool(row.any()) for row in delta.lora_A.grad], [bool(row.any()) for row in delta.lora_B.grad.T]
        expected = [False, False, True, False, False] if frozen else [True, True, True, False, False]
        assert moved == (expected, expected)


def test_ranks_are_drawn_evenly_and_are_a_function_of_seed_and_number():
    options = Options(rank=6, least_rank=2)
    drawn = [rank_at(options, n) for n in range(600)]
    assert drawn == [rank_at(options, n) for n in range(600)]
    assert drawn != [rank_at(Options(rank=6, least_rank=2, seed=1), n) for n in range(600)]
    assert set(drawn) == {2, 3, 4, 5, 6}
    assert all(abs(drawn.count(rank) - 120) < 40 for rank in range(2, 7))


def test_ranks_differ_from_step_to_step_in_training(tiny_lm_directory, given, tmp_path):
    settings = Settings(**{**given, "steps": 6, "micro_steps": 2}, rank=4, held_out=1)
    dylora(tiny_lm_directory, tmp_path / "out", settings)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    ranks = [row["rank"] for row in rows if "rank" in row]
    assert len(ranks) == 6 and len(set(ranks)) > 2 and any(rank != int(rank) for rank in ranks)  # two in a step


def test_rank_1_of_dylora_beats_a_lora_cut_to_rank_1(tiny_lm_directory, data, tmp_path):
    """What the paper is for. Each is trained alike; the LoRA's ranks are in no order."""
    same = dict(data=data, max_length=96, batch_size=2, precision="fp32", held_out=1, rank=8, alpha=8)
    same |= dict(steps=90, learning_rate=5e-3, schedule="constant", warmup=0)
    dylora(tiny_lm_directory, tmp_path / "dylora", Settings(**same))
    lora(tiny_lm_directory, tmp_path / "lora", LoraSettings(**same))
    losses = {}
    for name in ("dylora", "lora"):
        cut(tmp_path / name, tmp_path / f"{name}-1", CutSettings(rank=1))
        losses[name] = training_loss(tmp_path / f"{name}-1", data)
    start = training_loss(tiny_lm_directory, data)
    assert losses["dylora"] < losses["lora"] - 1 and losses["dylora"] < start - 2


def training_loss(directory, data):
    from bildung.data.batches import chat_examples, pad
    from bildung.data.text import conversations
    from bildung.train.fit import mean_loss
    from bildung.train.objectives import clm

    lm = bildung.load(directory)
    examples = chat_examples(lm.tokenizer, conversations(data), 96)
    return mean_loss(lm.model, clm, [pad(examples, lm.tokenizer.pad_id)])["loss"]


def test_a_cut_lora_is_said_to_be_any_share_of_it(tiny_lm_directory, given, tmp_path):
    lora(tiny_lm_directory, tmp_path / "lora", LoraSettings(**given, rank=4))
    record = cut(tmp_path / "lora", tmp_path / "cut", CutSettings(rank=2))
    assert any("in no order" in note for note in record.notes)
    before, after = (bildung.load(tmp_path / one).model.linears() for one in ("lora", "cut"))
    name = next(iter(after))
    first, second = before[name].deltas["default"], after[name].deltas["default"]
    assert second.scaling == first.scaling and torch.equal(second.lora_A, first.lora_A[:2])


def test_what_cannot_work_is_said(tiny_lm_directory, tiny_lm, given, tmp_path):
    for wrong, words in (
        (dict(least_rank=9), "least_rank"),
        (dict(held_out=0), "held_out = 0"),
        (dict(rank=0), "rank"),
    ):
        with pytest.raises(SettingsError, match=words):
            dylora(tiny_lm_directory, tmp_path / "out", Settings(**{**given, **wrong}))
    with pytest.raises(AdapterError, match="is not an adapter"):
        cut(tiny_lm_directory, tmp_path / "out", CutSettings(rank=1))
    lora(tiny_lm_directory, tmp_path / "lora", LoraSettings(**given, rank=4))
    with pytest.raises(AdapterError, match="merge"):
        dylora(tmp_path / "lora", tmp_path / "out", Settings(**given, held_out=1))
    with pytest.raises(SettingsError, match="has 1 to 4"):
        cut(tmp_path / "lora", tmp_path / "out", CutSettings(rank=5))
    lora(tiny_lm_directory, tmp_path / "dora", LoraSettings(**given, rank=4, dora=True))
    with pytest.raises(AdapterError, match="plain LoRAs"):
        cut_ranks(bildung.load(tmp_path / "dora").model, 2, None)

"""DoRA, PiSSA, the Gaussian start and LoRA+ as settings of `tune lora`."""

from __future__ import annotations

import json
import math

import pytest
import torch

import bildung
from bildung.core.errors import SettingsError
from bildung.core.settings import resolve
from bildung.model.config import from_dict
from bildung.model.dora import DoRA
from bildung.model.linear import deltas_off, replace_stores
from bildung.model.low_rank import principal
from bildung.model.nf4 import Nf4
from bildung.train.optim import optimizer_from
from bildung.tune.lora import Options, Settings, add_lora, lora


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("initialise", ["uniform", "gaussian", "pissa"])
@pytest.mark.parametrize("quantized", [False, True])
def test_training_starts_at_the_source(tiny_lm, logits, dora, initialise, quantized):
    if quantized:
        replace_stores(tiny_lm.model, "all", lambda linear: Nf4.quantize(linear.base.dense()))
    before = logits(tiny_lm)
    chosen = add_lora(tiny_lm.model, Options(rank=3, dora=dora, initialise=initialise))
    tolerance = 1e-4 if initialise == "pissa" else 0  # a sum of two terms that cancel
    torch.testing.assert_close(logits(tiny_lm), before, atol=tolerance, rtol=0)
    trained = sum(p.numel() for p in tiny_lm.model.parameters() if p.requires_grad)
    factors = sum(3 * (one.in_features + one.out_features) for one in chosen.values())
    assert trained == factors + dora * sum(one.out_features for one in chosen.values())
    tiny_lm.model(torch.tensor([[5, 6, 7]])).square().sum().backward()
    A = [(one.deltas["lora"].update if dora else one.deltas["lora"]).lora_A for one in chosen.values()]
    assert all(bool(one.grad.any()) == (initialise == "pissa") for one in A)  # B is 0 unless it is PiSSA's
    if dora:
        assert all(bool(one.deltas["lora"].magnitude.grad.any()) for one in chosen.values())


def test_pissa_starts_with_the_largest_singular_directions():
    torch.manual_seed(1)
    weight_OI = torch.randn(30, 50) @ torch.diag(torch.linspace(3, 0.1, 50))
    lora_A, lora_B = principal(weight_OI, 6)
    values = torch.linalg.svdvals(weight_OI)
    best = values[6:].square().sum().sqrt()  # Eckart and Young
    assert (weight_OI - lora_B @ lora_A).norm() < 1.001 * best
    torch.testing.assert_close(lora_A.norm(dim=1), lora_B.norm(dim=0))
    again = principal(weight_OI, 6)
    assert torch.equal(lora_A, again[0]) and torch.equal(lora_B, again[1])
    with pytest.raises(SettingsError, match="30 singular directions"):
        principal(weight_OI, 31)


@pytest.mark.parametrize("asked", [dict(initialise="pissa"), dict(dora=True), dict(dora=True, initialise="pissa")])
def test_trained_saved_and_loaded_it_is_the_same_and_the_base_untouched(
    tiny_lm_directory, given, tmp_path, logits, asked
):
    base = (tiny_lm_directory / "model.safetensors").read_bytes()
    record = lora(tiny_lm_directory, tmp_path / "out", Settings(**given, rank=4, alpha=6, **asked))
    assert record.measured["loss_last"] < record.measured["loss_first"]
    lm = bildung.load(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == (8 if "initialise" in asked else 4)
    assert config["lora_alpha"] / config["r"] == 6 / 4
    assert config["use_dora"] == asked.get("dora", False)
    with deltas_off(lm.model, "default"):
        without = logits(lm)
    assert torch.equal(without, logits(bildung.load(tiny_lm_directory)))
    assert (logits(lm) - without).abs().max() > 1e-3
    assert (tiny_lm_directory / "model.safetensors").read_bytes() == base


def test_dora_keeps_directions_and_lengths_apart(tiny_lm):
    chosen = add_lora(tiny_lm.model, Options(rank=2, dora=True, target="q_proj"))
    linear = next(iter(chosen.values()))
    delta = linear.deltas["lora"]
    assert isinstance(delta, DoRA)
    torch.nn.init.normal_(delta.update.lora_B)
    with torch.no_grad():
        delta.magnitude.mul_(2)
        weight_OI = linear.weight()
        torch.testing.assert_close(weight_OI.norm(dim=1), delta.magnitude)
        added = linear.base.dense() + delta.update.weight()
        cosine = torch.nn.functional.cosine_similarity(weight_OI, added, dim=1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw", "muon", "adafactor"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lora_plus_b_learns_faster_with_every_optimizer(tiny_lm, optimizer, tmp_path):
    """One step from the same gradient: A moves as with ratio 1, B sixteen times as far."""
    settings = dict(data="none", rank=4, learning_rate=1e-3, optimizer=optimizer, initialise="pissa")
    moved = {}
    for ratio in (1.0, 16.0):
        model = bildung.load(tiny_lm.path).model
        given = Settings(**settings, learning_rate_ratio=ratio)
        add_lora(model, given)
        folder = tmp_path / str(ratio)
        folder.mkdir()
        made = optimizer_from(model, given, folder)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model(torch.tensor([[5, 6, 7, 8]])).square().sum().backward()
        made.step()
        moved[ratio] = {
            name: (p.detach() - before[name]).norm() for name, p in model.named_parameters() if p.requires_grad
        }
    for name, distance in moved[1.0].items():
        expected = 16 if name.endswith("lora_B") else 1
        assert float(moved[16.0][name] / distance) == pytest.approx(expected, rel=0.02), name


def test_lora_plus_follows_the_schedule_and_is_recorded(tiny_lm_directory, given, tmp_path):
    settings = Settings(**given, rank=4, learning_rate_ratio=4, schedule="linear", warmup=0)
    record = lora(tiny_lm_directory, tmp_path / "out", settings)
    assert record.settings["learning_rate_ratio"] == 4
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])  # A's


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(rank=33), "rank is at most"),
        (dict(learning_rate_ratio=0.0), "learning_rate_ratio = 0"),
        (dict(learning_rate_ratio=math.inf), "learning_rate_ratio = inf"),
    ],
)
def test_what_cannot_work_is_said(tiny_lm_directory, given, tmp_path, wrong, words):
    with pytest.raises(SettingsError, match=words):
        lora(tiny_lm_directory, tmp_path / "out", Settings(**given, **wrong))
    assert not (tmp_path / "out").exists()


def test_an_unknown_start_is_refused():
    with pytest.raises(SettingsError, match="initialise"):
        resolve(Settings, {"data": "x", "initialise": "pisa"})


def test_counts_on_paper():
    """Rank 32 on q and v of the shape of Llama-3.2-3B: 9,175,040 numbers (peft's result file); DoRA's rows come on top.
    (IA)³ on k, v and down_proj: 28 · (1024 + 1024 + 8192)."""
    from bildung.tune.ia3 import Options as Ia3Options
    from bildung.tune.ia3 import add_ia3

    sizes = dict(
        model_type="llama", vocab_size=64, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip

    def count(add):
        with torch.device("meta"):
            model = bildung.build(from_dict(sizes))
        add(model)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    pair = dict(rank=32, target=("q_proj", "v_proj"))
    for initialise in ("uniform", "gaussian", "pissa"):
        assert count(lambda model, i=initialise: add_lora(model, Options(**pair, initialise=i))) == 9_175_040
    assert count(lambda model: add_lora(model, Options(**pair, dora=True))) == 9_175_040 + 28 * (3072 + 1024)
    assert count(lambda model: add_ia3(model, Ia3Options())) == 28 * (1024 + 1024 + 8192)

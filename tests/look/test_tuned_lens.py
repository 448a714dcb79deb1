"""The tuned lens: at first the logit lens bit for bit, then nearer to the prediction; saved, and refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bildung
from bildung.core.errors import ModelFileError, SettingsError
from bildung.look import logit_lens as lens_operation
from bildung.look import tuned_lens as operation
from bildung.look.lenses.lens import kl as divergence
from bildung.look.lenses.lens import lens_difference, logit_lens
from bildung.look.lenses.translators import check_belongs, new_lens, read_lens, weights_hash, write_lens
from bildung.look.tuned_lens import Pieces, Settings, kl_by_layer, objective
from bildung.model.linear import Linear
from bildung.model.low_rank import LowRank
from bildung.model.taps import observe
from tests.model.tiny import tiny_lm

TEXT = "The quick brown fox"


def test_untrained_it_is_the_logit_lens_bit_for_bit() -> None:
    for changes in ({}, {"dtype": "bfloat16"}):
        lm = tiny_lm(num_hidden_layers=3)
        if changes:
            lm.model.to(torch.bfloat16)
        tuned = new_lens(lm)
        plain, through = logit_lens(lm, TEXT), logit_lens(lm, TEXT, tuned=tuned)
        for name in ("top_ids_NLK", "top_probs_NLK", "rank_NL", "kl_NL", "entropy_NL"):
            assert torch.equal(getattr(plain, name), getattr(through, name)), name
        torch.nn.init.normal_(tuned.layers[0].bias)
        moved = logit_lens(lm, TEXT, tuned=tuned)
        assert not torch.equal(moved.kl_NL[0], plain.kl_NL[0])
        assert torch.equal(moved.kl_NL[1:], plain.kl_NL[1:])  # each layer has its own map, the last has none


def test_gradients_and_value_are_those_of_the_plain_formula() -> None:
    lm = tiny_lm(num_hidden_layers=3)
    lm.model.requires_grad_(False)
    tuned = new_lens(lm)
    for layer in tuned.layers:
        torch.nn.init.normal_(layer.weight, 0, 0.05)
    tokens_BL = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = objective(lm)(tuned, Pieces(tokens_BL, 18))
    loss.total.backward()
    found = [parameter.grad.clone() for parameter in tuned.parameters()]
    tuned.zero_grad()
    with observe(lm.model, "layers.*.resid_post") as seen:
        final = lm.model(tokens_BL).log_softmax(-1)
    plain = sum(
        (divergence(final, logits.log_softmax(-1))).sum()
        for logits in (
            lm.model.unembed(lm.model.final_norm(tuned(seen[f"layers.{n}.resid_post"], n))) for n in range(2)
        )
    )
    plain.backward()
    assert loss.total.item() == pytest.approx(plain.item(), rel=1e-4) and loss.count == 18
    for mine, parameter in zip(found, tuned.parameters(), strict=True):
        assert torch.allclose(mine, parameter.grad, rtol=1e-3, atol=1e-4)


def test_training_brings_every_layer_nearer_and_the_file_knows_its_weights(tmp_path: Path) -> None:
    small = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8}
    bildung.save(tiny_lm(num_hidden_layers=3, initializer_range=0.2, **small), tmp_path / "lm")
    settings = Settings(
        data="mini:moby", steps=40, rows=4, length=32, held_out=4, positions=100, learning_rate=5e-3, precision="fp32"
    )
    record = operation.tuned_lens(tmp_path / "lm", tmp_path / "lens", settings)
    before, after = record.measured["kl_before"], record.measured["kl_after"]
    assert len(before) == 2 and all(b < 0.9 * a for a, b in zip(before, after, strict=True)), (before, after)
    lm = bildung.load(tmp_path / "lm")
    told = json.loads((tmp_path / "lens/tuned_lens.json").read_text())
    assert told["weights"] == weights_hash(lm) == record.measured["weights"] and told["layers"] == 3
    lens = read_lens(tmp_path / "lens", lm)
    ids = torch.tensor([lm.tokenizer.encode(TEXT)])
    assert kl_by_layer(lm, lens, ids)[0] < kl_by_layer(lm, new_lens(lm), ids)[0]
    page = lens_operation.Settings(prompt=TEXT, tuned=tmp_path / "lens")
    lens_operation.logit_lens(tmp_path / "lm", tmp_path / "page", page)
    numbers = json.loads((tmp_path / "page/lens.json").read_text())
    mean = sum(numbers["a"]["kl"][0]) / len(numbers["a"]["kl"][0])
    assert mean == pytest.approx(kl_by_layer(lm, lens, ids)[0], rel=0.02)
    assert "tuned lens" in (tmp_path / "page/lens.html").read_text()
    with pytest.raises(SettingsError, match="no second model"):
        settings_b = lens_operation.Settings(prompt=TEXT, against_tuned=tmp_path / "lens")
        lens_operation.logit_lens(tmp_path / "lm", tmp_path / "other", settings_b)


def test_it_is_refused_on_other_weights_naming_both(tmp_path: Path) -> None:
    lm, other = tiny_lm(), tiny_lm()
    tuned = new_lens(lm)
    check_belongs(tuned, tiny_lm())  # the same weights in another place
    linear: Linear = other.model.linears()["model.layers.1.mlp.down_proj"]
    linear.deltas["tune"] = LowRank(linear.in_features, linear.out_features, rank=2, scaling=1.0)
    write_lens(tuned, tmp_path)
    with pytest.raises(ModelFileError) as refused:
        read_lens(tmp_path, other)
    assert weights_hash(lm)[:16] in str(refused.value) and weights_hash(other)[:16] in str(refused.value)
    with pytest.raises(ModelFileError, match="belongs to the weights"):
        lens_difference(lm, other, TEXT, tuned=(tuned, tuned))
    assert lens_difference(lm, other, TEXT, tuned=(tuned, new_lens(other))).kl_NL.shape[0] == 2
    (tmp_path / "tuned_lens.json").write_text("{}")
    with pytest.raises(ModelFileError, match="cannot be used"):
        read_lens(tmp_path, lm)
    with pytest.raises(ModelFileError, match="holds no tuned lens"):
        read_lens(tmp_path / "nowhere", lm)

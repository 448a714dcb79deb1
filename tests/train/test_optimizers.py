"""What holds for every optimizer: exact resume, falling loss, the promised memory, and settings that fit together."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from bildung.core.errors import SettingsError, TrainingError
from bildung.train.fit import fit, mean_loss
from bildung.train.objectives import clm
from bildung.train.optim import bfloat16_weights, cosine, optimizer_from
from bildung.train.parallel import held_bytes
from bildung.train.regularise import add_gradient_noise, add_l1, neftune
from bildung.train.training import Training

ALL = {
    "adamw": dict(optimizer="adamw"),
    "muon": dict(optimizer="muon"),
    "adafactor": dict(optimizer="adafactor"),
    "adafactor, relative": dict(optimizer="adafactor", relative_step=True),
    "adamw_8bit": dict(optimizer="adamw_8bit"),
    "paged_adamw": dict(optimizer="paged_adamw", page_budget=0.033),
    "stochastic": dict(weights="stochastic"),
    "kahan": dict(weights="kahan"),
}
EVERY = pytest.mark.parametrize("given", ALL.values(), ids=ALL.keys())


def as_settings(given, **other):
    return Training(**{"learning_rate": 1e-2, "weight_decay": 0.1, **given, **other})


def large(make_model, given):
    """A model with matrices above 4096 numbers, so that 8 bits are used."""
    model = make_model()
    model.model.embed_tokens = nn.Embedding(300, 24)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2, generator=torch.Generator().manual_seed(3))
    if given.weights != "fp32":
        bfloat16_weights(model)
    return model


@EVERY
def test_2n_steps_are_n_steps_resumed_for_n_more(make_model, batch_at, tmp_path, given):
    """Bit for bit, with gradient noise and NEFTune beside it."""
    given = as_settings(given)

    def run(out, steps):
        model = large(make_model, given)
        optimizer = optimizer_from(model, given, tmp_path)
        add_gradient_noise(optimizer, 0.01, given.seed)
        with neftune(model, 5.0):
            fit(model, batch_at, clm, optimizer, steps=steps, schedule=cosine(6), clip=1.0, out=out, checkpoint_every=3)
        return model.state_dict(), optimizer.state_dict()["state"]

    straight, state = run(tmp_path / "straight", 6)
    run(tmp_path / "halves", 3)
    resumed, resumed_state = run(tmp_path / "halves", 6)
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), name
    assert state.keys() == resumed_state.keys()
    for number, values in state.items():
        for key, value in values.items():
            other = resumed_state[number][key]
            assert (
                torch.equal(value, other) and value.dtype == other.dtype if torch.is_tensor(value) else value == other
            )


@EVERY
def test_the_loss_falls(make_model, batch_at, given):
    rate = 0.1 if given.get("relative_step") else 1e-2
    given = as_settings(given, learning_rate=rate)
    model = large(make_model, given)
    objective = partial(mean_loss, objective=clm, batches=[batch_at(0)])
    before = objective(model)["loss"]
    fit(model, lambda n: batch_at(0), clm, optimizer_from(model, given), steps=20, clip=1.0)
    assert objective(model)["loss"] < 0.6 * before


@pytest.mark.parametrize(
    "name, low, high",
    [("adamw", 8.0, 8.1), ("muon", 4.0, 4.1), ("adafactor", 0.0, 0.1), ("adamw_8bit", 2.0, 2.1)],
)
def test_bytes_per_parameter_are_those_promised(name, low, high):
    layer = nn.ModuleList([nn.Linear(256, 256, bias=False)])
    layer[0].weight.grad = torch.randn(256, 256)
    optimizer = optimizer_from(layer, as_settings({"optimizer": name}))
    optimizer.step()
    assert low <= held_bytes(layer, optimizer)["optimizer"] / 256**2 <= high


@pytest.mark.parametrize("weights, expected", [("stochastic", 8), ("kahan", 10)])
def test_bytes_beside_bfloat16_weights(weights, expected):
    layer = nn.Linear(256, 256, bias=False).bfloat16()
    layer.weight.grad = torch.randn(256, 256).bfloat16()
    optimizer = optimizer_from(layer, as_settings({"weights": weights}))
    optimizer.step()
    held = held_bytes(layer, optimizer)
    assert [held[part] / 256**2 for part in ("weights", "gradients", "optimizer")] == [2, 2, expected]


def test_the_default_is_adamw_with_vectors_not_decayed(make_model):
    optimizer = optimizer_from(make_model(), Training(weight_decay=0.3))
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_muon_takes_the_matrices_inside_the_layers_alone(make_model):
    model = make_model()
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = optimizer_from(model, as_settings({"optimizer": "muon"}))
    by_muon = {name_of[p] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    by_adamw = {name_of[p] for group in optimizer.param_groups if not group["muon"] for p in group["params"]}
    assert len(by_muon) == 2 * 7 and all("_proj" in name for name in by_muon)
    assert {"model.embed_tokens.weight", "lm_head.base.weight", "model.norm.weight"} <= by_adamw
    assert len(by_muon) + len(by_adamw) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(optimizer="muon", weights="kahan"), "adamw only"),
        (dict(relative_step=True), "adafactor only"),
        (dict(l1=0.1, weights="stochastic"), "round away"),
        (dict(optimizer="adamw_8bit", parallel="zero3"), "only adamw and muon"),
        (dict(weights="kahan", parallel="zero2"), "only adamw and muon"),
        (dict(optimizer="paged_adamw", parallel="zero1"), "choose one"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(make_model, given, said):
    with pytest.raises(SettingsError, match=said):
        optimizer_from(make_model(), as_settings(given))


def test_muon_without_layers_is_refused():
    with pytest.raises(TrainingError, match="inside a stack of layers"):
        optimizer_from(nn.Linear(3, 3), as_settings({"optimizer": "muon"}))


def test_l1_needs_float32(make_model):
    model = make_model()
    bfloat16_weights(model)
    with pytest.raises(SettingsError, match="float32"):
        add_l1(optimizer_from(model, as_settings({"weights": "kahan"})), 0.1)

"""Norms, activations and their places: formulas, peers, and who depends on whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from bildung.core.errors import ConfigError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.layers import ACTIVATIONS, BatchNorm, LayerNorm, RMSNorm, activation
from bildung.model.store import assemble, state_tensors
from bildung.model.taps import observe
from bildung.model.transformer import Decoder
from tests.model.tiny import tokens

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1


def filled(norm: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in norm.named_parameters():
        if "running" not in name:
            parameter.data.normal_(generator=generator)
    return norm


def model_with(**changes: Any) -> Decoder:
    raw = dict(
        model_type="bildung", vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        initializer_range=0.2,
    )  # fmt: skip
    return build(from_dict({**raw, **changes}), seed=3).eval()


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_norms_equal_torchs(eps: float) -> None:
    layer, rms = filled(LayerNorm(8, eps)), filled(RMSNorm(8, eps))
    theirs = nn.functional.layer_norm(X, (8,), layer.weight, layer.bias, eps)
    torch.testing.assert_close(layer(X), theirs)
    torch.testing.assert_close(rms(X), nn.functional.rms_norm(X, (8,), rms.weight, eps))


def test_an_offset_norm_adds_one_to_its_weight_in_float32() -> None:
    plain, offset = filled(RMSNorm(8, 1e-6)), RMSNorm(8, 1e-6, offset=1.0)
    offset.weight.data = plain.weight.data - 1
    torch.testing.assert_close(offset(X), plain(X))
    # A weight near 0 survives bfloat16 activations, which 1 + weight rounded to bfloat16 would not.
    offset.weight.data.fill_(0.001)
    assert (offset(X.bfloat16()).float() != RMSNorm(8, 1e-6)(X.bfloat16()).float()).any()


def test_batch_norm_equals_torchs_in_training_and_evaluation() -> None:
    ours = filled(BatchNorm(8, 1e-5))
    theirs = nn.BatchNorm1d(8, eps=1e-5)
    theirs.load_state_dict(
        {**{k: v.clone() for k, v in ours.state_dict().items()}, "num_batches_tracked": torch.tensor(0)}
    )
    for _ in range(3):
        torch.testing.assert_close(ours(X).flatten(0, 1), theirs(X.flatten(0, 1)))
    torch.testing.assert_close(ours.running_mean.data, theirs.running_mean)
    torch.testing.assert_close(ours.running_var.data, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(X).flatten(0, 1), theirs(X.flatten(0, 1)))
    assert not ours.running_mean.requires_grad


def test_batch_norm_is_a_model_that_trains_is_saved_and_loaded() -> None:
    model = model_with(norm="batch").train()
    model(tokens()).logsumexp(-1).sum().backward()
    assert model.model.norm.weight.grad is not None and model.model.norm.running_mean.grad is None
    model.eval()
    again = assemble(model.config, dict(state_tensors(model)))
    assert torch.equal(again(tokens()), model(tokens()))
    assert (model.model.norm.running_mean != 0).any()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), atol=2e-6, rtol=1e-5)


def test_an_unknown_activation_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'gelu_tanh' is not known.*did you mean"):
        activation("gelu_tanh")


def spread(x: Tensor) -> Tensor:
    return x.float().pow(2).mean(-1).sqrt()


def test_where_the_norm_stands() -> None:
    """post: the stream itself is normed. sandwich: what is added is. pre: neither is, and the stream grows."""
    seen: dict[str, dict[str, Tensor]] = {}
    for place in ("pre", "post", "sandwich"):
        model = model_with(norm_placement=place)
        with observe(model, "layers.*.resid_*") as found:
            model(tokens())
        seen[place] = dict(found)
    one = torch.ones(2, 11)
    torch.testing.assert_close(spread(seen["post"]["layers.0.resid_mid"]), one, atol=1e-3, rtol=0)
    torch.testing.assert_close(spread(seen["post"]["layers.1.resid_post"]), one, atol=1e-3, rtol=0)
    added = seen["sandwich"]["layers.1.resid_post"] - seen["sandwich"]["layers.1.resid_mid"]
    torch.testing.assert_close(spread(added), one, atol=1e-3, rtol=0)
    added = seen["pre"]["layers.1.resid_post"] - seen["pre"]["layers.1.resid_mid"]
    assert (spread(added) - 1).abs().min() > 0.1


def test_parallel_sublayers_read_the_same_stream() -> None:
    model = model_with(parallel_residual=True)
    with observe(model, "layers.0.*") as seen:
        model(tokens())
    block = model.model.layers[0]
    expected = block.mlp(block.post_attention_layernorm(seen["layers.0.resid_pre"]))
    torch.testing.assert_close(seen["layers.0.resid_post"] - seen["layers.0.resid_mid"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["embed_dropout", "attention_dropout", "residual_dropout", "activation_dropout"])
def test_dropout_acts_in_training_only(place: str) -> None:
    model = model_with(**{place: 0.5})
    assert torch.equal(model(tokens()), model_with()(tokens()))
    model.train()
    torch.manual_seed(0)
    first = model(tokens())
    assert not torch.equal(first, model(tokens()))
    torch.manual_seed(0)
    assert torch.equal(first, model(tokens()))

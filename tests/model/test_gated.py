"""The gated feed-forward in training: autograd's numbers bit for bit, and a third less kept for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.layers import ACTIVATIONS, MLP, _Gated
from bildung.model.taps import Taps, observe


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, dy = (torch.randn(3, 5, 8).to(dtype) for _ in range(3))
    return gate.requires_grad_(), up.requires_grad_(), dy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_output_and_gradients_are_autograds(name: str, dtype: torch.dtype) -> None:
    gate, up, dy = inputs(dtype)
    act = ACTIVATIONS[name]
    plain, ours = act(gate) * up, _Gated.apply(gate, up, act)
    assert torch.equal(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (gate, up), dy), torch.autograd.grad(plain, (gate, up), dy), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_right() -> None:
    gate, up, _ = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda g, u: _Gated.apply(g, u, ACTIVATIONS["silu"]), (gate, up))


def kept(f) -> int:  # type: ignore[no-untyped-def]
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = f()
    del y
    return sum(found.values())


def test_it_keeps_gate_and_up() -> None:
    gate, up, _ = inputs(torch.bfloat16)
    assert kept(lambda: _Gated.apply(gate, up, ACTIVATIONS["silu"])) == gate.nbytes + up.nbytes
    assert kept(lambda: ACTIVATIONS["silu"](gate) * up) == 3 * gate.nbytes


KEYS = dict(model_type="llama", vocab_size=61, hidden_size=8, intermediate_size=24, num_hidden_layers=1)
KEYS |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16, rms_norm_eps=1e-5)
KEYS |= dict(tie_word_embeddings=False, initializer_range=0.2)


def test_in_the_model_it_stands_before_the_tap() -> None:
    mlp = MLP(from_dict(KEYS), Taps(), "layers.0.mlp")
    torch.nn.init.normal_(mlp.gate_proj.base.weight), torch.nn.init.normal_(mlp.up_proj.base.weight)
    torch.nn.init.normal_(mlp.down_proj.base.weight)
    x = torch.randn(2, 10, 8, requires_grad=True)
    wide, weights = 2 * 10 * 24 * 4, sum(parameter.nbytes for parameter in mlp.parameters())
    assert kept(lambda: mlp(x)) == x.nbytes + weights + 3 * wide  # gate, up, and what down_proj reads
    model, tokens = build(from_dict(KEYS)), torch.randint(0, 61, (2, 10))
    with observe(model, "layers.0.mlp.act") as seen:
        model(tokens)
    trained = seen["layers.0.mlp.act"]
    with observe(model, "layers.0.mlp.act") as seen, torch.no_grad():
        model(tokens)
    assert torch.equal(trained, seen["layers.0.mlp.act"])


def test_compiled() -> None:
    mlp = MLP(from_dict(KEYS), Taps(), "layers.0.mlp")
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x, dy = torch.randn(2, 10, 8, requires_grad=True), torch.randn(2, 10, 8)
    (plain,) = torch.autograd.grad(mlp(x), x, dy)
    (made,) = torch.autograd.grad(torch.compile(mlp, backend="aot_eager", fullgraph=True)(x), x, dy)
    torch.testing.assert_close(made, plain)

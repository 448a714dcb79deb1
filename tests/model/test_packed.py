"""Packed matrices compute the same, only without gradients, and leave no trace."""

from __future__ import annotations

import pytest
import torch

from bildung.model.linear import Linear, record_weights
from bildung.model.low_rank import LowRank
from bildung.model.packed import packed
from bildung.model.transformer import Decoder
from tests.model.tiny import tiny_decoder, tokens


def packed_names(model: Decoder) -> list[str]:
    """Names of the matrices that have a copy of their own or a share in one."""
    return [
        name
        for name, linear in model.linears().items()
        if linear.joint is not None or getattr(linear.base, "packed", None) is not None
    ]


def add_delta(linear: Linear) -> None:
    linear.deltas["edit"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
    torch.nn.init.normal_(linear.deltas["edit"].lora_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 11])
def test_the_same_logits(dtype: torch.dtype, length: int) -> None:
    model = tiny_decoder(model_type="qwen2", head_dim=None, hidden_size=60)  # has biases
    for linear in model.linears().values():
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
    model.compute_dtype = dtype  # float32 masters
    names, state = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(tokens(length=length))
        with packed(model):
            assert packed_names(model) == list(model.linears())
            with packed(model):
                inside = model(tokens(length=length))
            assert packed_names(model) == list(model.linears()), "the inner block took nothing away"
            assert list(model.state_dict()) == names
        assert not packed_names(model)
    # One unit in the last place of the largest logits: the order of summation is the kernel's.
    tolerance = 1e-4 if dtype == torch.float32 else 2**-8 * plain.abs().max().item()
    torch.testing.assert_close(inside, plain, atol=tolerance, rtol=0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_gradients_take_the_ordinary_matrices() -> None:
    model = tiny_decoder()
    with packed(model):
        model(tokens()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_stays_after_an_error() -> None:
    model = tiny_decoder()
    with pytest.raises(KeyError), packed(model):
        raise KeyError
    assert not packed_names(model)


def test_no_copies_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_decoder()
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with packed(model):
        assert not packed_names(model)


def test_matrices_with_something_added_stay_apart() -> None:
    model = tiny_decoder()
    attention = model.model.layers[0].self_attn
    add_delta(attention.q_proj)
    with torch.no_grad():
        plain = model(tokens())
        with packed(model):
            assert attention.q_proj.joint is None and attention.q_proj.base.packed is not None
            assert model.model.layers[1].self_attn.q_proj.joint is not None
            torch.testing.assert_close(model(tokens()), plain, atol=1e-4, rtol=0)


def test_what_is_added_inside_the_block_counts() -> None:
    model = tiny_decoder()
    linear = model.model.layers[0].mlp.up_proj
    with torch.no_grad(), packed(model):
        before = model(tokens())
        add_delta(linear)
        inside = model(tokens())
    assert (inside - before).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(inside, model(tokens()), atol=1e-4, rtol=0)


def test_recorders_hear_every_matrix() -> None:
    heard: list[str] = []

    class Ear:
        def inputs(self, name: str, x_BLI: torch.Tensor) -> None:
            heard.append(name)

        def gradients(self, name: str, x_BLI: torch.Tensor, grad_BLO: torch.Tensor) -> None: ...

    model = tiny_decoder()
    with torch.no_grad(), packed(model), record_weights(model, "all", Ear()):
        model(tokens())
    assert sorted(heard) == sorted(name for name in model.linears() if name != "lm_head")

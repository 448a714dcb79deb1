"""Packed matrices compute the same, only without gradients, and leave no trace."""

from __future__ import annotations

import pytest
import torch

from bildung.model.packed import packed
from bildung.model.transformer import Decoder
from tests.model.tiny import tiny_decoder, tokens


def packed_names(model: Decoder) -> list[str]:
    return [name for name, linear in model.linears().items() if getattr(linear.base, "packed", None) is not None]


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

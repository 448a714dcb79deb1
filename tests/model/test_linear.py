"""The weight seam: stores, deltas, the switch, and the recorder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bildung.core.errors import NoSuchLinear
from bildung.model.linear import Dense, deltas_off, linears, match_linears, record_weights, replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import Int8, Nf4
from bildung.model.transformer import Decoder
from tests.model.tiny import tiny_decoder, tokens

METHODS = {
    "dense": lambda linear: linear.base,
    "int8": lambda linear: Int8.quantize(linear.base.dense()),
    "nf4": lambda linear: Nf4.quantize(linear.base.dense()),
}


def with_lora(model: Decoder, name: str = "lora", rank: int = 3, *, trained: bool = True) -> Decoder:
    for linear in match_linears(model, "all").values():
        linear.deltas[name] = LowRank(linear.in_features, linear.out_features, rank, scaling=2.0)
        if trained:
            torch.nn.init.normal_(linear.deltas[name].lora_B, std=0.3)
    return model


@pytest.mark.parametrize("store", METHODS)
def test_a_fresh_low_rank_delta_changes_nothing_bit_for_bit(store: str) -> None:
    model = tiny_decoder()
    replace_stores(model, "all", METHODS[store])
    before = model(tokens())
    assert torch.equal(with_lora(model, trained=False)(tokens()), before)


@pytest.mark.parametrize("store", METHODS)
def test_merged_equals_unmerged(store: str) -> None:
    model = tiny_decoder()
    replace_stores(model, "all", METHODS[store])
    plain = model(tokens())
    unmerged = with_lora(model)(tokens())
    weights = {name: linear.weight().detach() for name, linear in match_linears(model, "all").items()}
    for name, linear in match_linears(model, "all").items():
        del linear.deltas["lora"]
        linear.base = Dense(torch.nn.Parameter(weights[name]))
    torch.testing.assert_close(model(tokens()), unmerged, atol=5e-5, rtol=1e-5)
    assert (unmerged - plain).abs().max() > 0.1


def test_low_rank_update_has_its_rank_and_scaling() -> None:
    delta = LowRank(20, 30, 4, scaling=0.5)
    torch.nn.init.normal_(delta.lora_B)
    assert torch.linalg.matrix_rank(delta.weight()) == 4
    assert delta.lora_A.abs().max() <= 20**-0.5
    x = torch.randn(2, 5, 20)
    torch.testing.assert_close(delta(x, torch.zeros(2, 5, 30)), 0.5 * x @ delta.lora_A.T @ delta.lora_B.T)


def test_only_the_factors_get_gradients_and_A_gets_none_at_step_zero() -> None:
    model = tiny_decoder().requires_grad_(False)
    with_lora(model, trained=False)
    model(tokens()).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        elif "lora_A" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() == 0, name
        else:
            assert parameter.grad is None, name


def test_deltas_switch_off_by_name_and_come_back() -> None:
    model = tiny_decoder()
    plain = model(tokens())
    with_lora(model, "first")
    first = model(tokens())
    with_lora(model, "second")
    both = model(tokens())
    with deltas_off(model, "second"):
        assert torch.equal(model(tokens()), first)
        with deltas_off(model, "first"):
            assert torch.equal(model(tokens()), plain)
        assert torch.equal(model(tokens()), first)
    assert torch.equal(model(tokens()), both)
    with pytest.raises(NoSuchLinear, match="first, second"), deltas_off(model, "third"):
        pass


def test_patterns() -> None:
    model = tiny_decoder()
    assert "lm_head" in linears(model) and "lm_head" not in match_linears(model, "all")
    assert len(match_linears(model, ("q_proj", "v_proj"))) == 4
    assert list(match_linears(model, "*.layers.1.mlp.*")) == [
        f"model.layers.1.mlp.{w}_proj" for w in ("gate", "up", "down")
    ]
    assert list(match_linears(model, "layers.0.self_attn.o_proj")) == ["model.layers.0.self_attn.o_proj"]
    with pytest.raises(NoSuchLinear, match="did you mean 'q_proj'"):
        match_linears(model, ("v_proj", "q_prj"))


def test_recorder_yields_inputs_and_output_gradients() -> None:
    """The gradient of a matrix is the sum of outer products δ x^T: what MEND, EWC and GPTQ build on."""
    model = tiny_decoder()
    seen: dict[str, Tensor] = {}

    class OuterProducts:
        def inputs(self, name: str, x_BLI: Tensor) -> None:
            seen[f"{name} inputs"] = x_BLI

        def gradients(self, name: str, x_BLI: Tensor, grad_BLO: Tensor) -> None:
            assert torch.equal(x_BLI, seen[f"{name} inputs"])
            seen[name] = torch.einsum("blo,bli->oi", grad_BLO, x_BLI)

    with record_weights(model, "all", OuterProducts()):
        model(tokens()).logsumexp(-1).sum().backward()
    for name, linear in match_linears(model, "all").items():
        torch.testing.assert_close(seen[name], linear.base.weight.grad, atol=1e-4, rtol=1e-4)
    seen.clear()
    model(tokens())
    assert not seen

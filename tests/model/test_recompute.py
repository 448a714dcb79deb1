"""Activations computed again: the same gradients bit for bit, and much less kept for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import match_linears
from bildung.model.low_rank import LowRank
from bildung.model.recompute import Recompute, set_recompute
from bildung.model.taps import intervene, observe

LLAMA = dict(model_type="llama", vocab_size=61, hidden_size=16, intermediate_size=40, num_hidden_layers=3)
LLAMA |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-5)
LLAMA |= dict(tie_word_embeddings=True, initializer_range=0.2)
GPT2 = dict(model_type="gpt2", n_embd=16, n_head=2, n_layer=3, vocab_size=61, n_positions=64, initializer_range=0.2)
GPT2 |= dict(attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.1)
BART = dict(model_type="bart", vocab_size=61, d_model=16, encoder_layers=2, decoder_layers=2, dropout=0.2)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
KINDS: tuple[Recompute, ...] = ("attention", "mlp", "blocks")


def lora(model: Any) -> Any:
    model.requires_grad_(False)
    for number, linear in enumerate(match_linears(model, "all").values()):
        generator = torch.Generator().manual_seed(number)
        delta = LowRank(linear.in_features, linear.out_features, 2, 1.0, 0.3, generator=generator)
        torch.nn.init.normal_(delta.lora_B, std=0.3, generator=generator)
        linear.deltas["x"] = delta
    return model


MODELS = {
    "llama": lambda: build(from_dict(LLAMA)),
    "gpt2, dropout": lambda: build(from_dict(GPT2)),
    "bart, dropout": lambda: build(from_dict(BART)),
    "lora, dropout": lambda: lora(build(from_dict(LLAMA))),
}


def hidden(model: Any) -> Tensor:
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(3))
    reader = model.given(tokens) if model.config.kind == "encoder-decoder" else model
    return reader.hidden(tokens)


def gradients(model: Any, what: Recompute, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    model.train().zero_grad()
    model.compute_dtype = dtype
    set_recompute(model, what)
    torch.manual_seed(5)
    hidden(model).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bits(name: str, what: Recompute) -> None:
    model = MODELS[name]()
    for dtype in (None, torch.bfloat16):
        plain, again = gradients(model, "none", dtype), gradients(model, what, dtype)
        assert plain.keys() == again.keys() and plain
        for key in plain:
            assert torch.equal(plain[key], again[key]), key


def kept(model: Any, what: Recompute) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    set_recompute(model.train(), what)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = hidden(model)
    del h
    return sum(storage.nbytes() for storage in found.values())


def test_what_is_kept() -> None:
    """In numbers per token and layer: the tables of the docstring, and a few small ones."""
    model, one = build(from_dict(LLAMA)), 2 * 20 * 4
    D, F, H = 16, 40, 8
    plain = kept(model, "none")
    # attention: q and the rotated q, k, v are D + 2 H, the kernel's output D and, of its own, a number per head
    assert plain - kept(model, "attention") >= 3 * one * (2 * D + 2 * H)
    assert plain - kept(model, "mlp") == 3 * one * 3 * F
    # per layer its input; the last norm keeps its input and a number per token, the first layers share nothing
    blocks = kept(model, "blocks")
    assert 3 * one * D <= blocks <= 3 * one * D + one * (D + 4) + 4096
    assert blocks < plain / 3


def test_only_in_training() -> None:
    model = build(from_dict(LLAMA))
    set_recompute(model, "blocks")
    calls: list[int] = []
    with intervene(model, {"layers.1.resid_mid": lambda x: calls.append(1)}):  # type: ignore[func-returns-value]
        model.eval()
        hidden(model).sum().backward()
        assert len(calls) == 1
        model.train()
        hidden(model).sum().backward()
        assert len(calls) == 3
        with torch.no_grad():
            hidden(model)
        assert len(calls) == 4


@pytest.mark.parametrize("what", KINDS)
def test_an_intervention_that_is_over_takes_part_in_its_backward_pass(what: Recompute) -> None:
    model, found = build(from_dict(LLAMA)).train(), []
    edits = {"layers.1.mlp.act": lambda x: 2 * x, "layers.1.attn.z": lambda x: 3 * x, "layers.1.resid_mid": torch.sin}
    for one in ("none", what):
        set_recompute(model, one)
        model.zero_grad()
        with intervene(model, edits), observe(model, "layers.*.resid_post") as seen:
            total = hidden(model).square().sum()
        assert len(seen) == 3
        total.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert not model.taps.listeners
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled() -> None:
    model = build(from_dict(LLAMA))
    plain = gradients(model, "none")
    for what in KINDS:
        torch.compiler.reset()
        model.zero_grad()
        set_recompute(model.train(), what)
        run = torch.compile(lambda: hidden(model), backend="aot_eager")
        run().float().square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, plain[name], rtol=1e-3, atol=1e-4)


def test_a_model_without_layers_is_refused() -> None:
    model = build(from_dict({"model_type": "rnn", "hidden_size": 8, "vocab_size": 20}))
    set_recompute(model, "none")
    with pytest.raises(SettingsError, match="recompute = 'blocks' is for stacks"):
        set_recompute(model, "blocks")

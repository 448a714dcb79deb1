"""Bytes before a run: counted on tensors without numbers, equal to what autograd really keeps."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bildung.app.planning.training import text
from bildung.core.hardware import Tidy
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.count import on_paper
from bildung.model.linear import match_linears
from bildung.model.low_rank import LowRank
from bildung.model.quantized import Int8, Nf4
from bildung.train.ledger import Ledger, paper_of, without_numbers
from bildung.train.objectives import clm
from bildung.train.optim import optimizer_from
from bildung.train.plan import Plan, any_objective, plan, run_on_paper, state_bytes
from bildung.train.shards import held_bytes
from bildung.train.speed import speed
from bildung.train.training import Training
from tests.train.parallel_run import KEYS


def really_alive(model: torch.nn.Module, rows: int, length: int) -> tuple[int, int]:
    """(bytes kept after the forward pass, the most at a time), of tensors with numbers."""
    gc.collect()
    ledger = Ledger(lambda tensor: "all", paper_of(model))
    for parameter in model.parameters():
        ledger.note(parameter, "weights")
    ledger.alive.clear()
    with ledger:
        loss = clm(model, text(rows, length, packed=True))
        kept = ledger.alive["all"]
        loss.total.backward()
    return kept, ledger.fullest.total()


def lora(model: torch.nn.Module) -> torch.nn.Module:
    model.requires_grad_(False)
    for linear in match_linears(model, "all").values():
        linear.deltas["x"] = LowRank(linear.in_features, linear.out_features, 2, 1.0, 0.1, device=model.device)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["all", "lora"])
def test_what_is_counted_is_what_is_there(dtype: torch.dtype, what: str) -> None:
    model = build(from_dict(KEYS)).requires_grad_(True)
    model = lora(model) if what == "lora" else model
    model.compute_dtype = dtype
    paper = without_numbers(model)
    kept, most = really_alive(model, 3, 40)
    kept_on_paper, most_on_paper = really_alive(paper, 3, 40)
    assert kept_on_paper == pytest.approx(kept, rel=0.01)
    assert most_on_paper == pytest.approx(most, rel=0.01)
    assert all(parameter.grad is None or not parameter.grad.isnan().any() for parameter in model.parameters())


def test_recomputing_and_rows_change_what_is_kept() -> None:
    model = on_paper(from_dict({**KEYS, "num_hidden_layers": 6})).requires_grad_(True)

    def activations(rows: int, recompute: str = "none") -> int:
        return max(moment["activations"] for moment in run_on_paper(model, clm, text(rows, 40), recompute=recompute))

    assert activations(8) == pytest.approx(2 * activations(4), rel=0.1)
    assert activations(8, "blocks") < activations(8, "mlp") < activations(8)
    assert all(layer.recompute == "none" for layer in model.model.layers)


@pytest.mark.parametrize("kind", [Int8, Nf4])
def test_quantized_weights_count_as_they_are_stored(kind: type) -> None:
    model = build(from_dict({**KEYS, "hidden_size": 64, "intermediate_size": 128}))
    dense = plan(model, any_objective, (2, 8)).weights
    for linear in match_linears(model, "all").values():
        linear.base = kind.quantize(linear.base.dense())
    made = plan(lora(model), any_objective, (2, 8))
    assert made.weights < dense / 2 and made.trainable > 0


SMALL = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
BART = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1}
KINDS = {
    "learned positions": {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 50},
    "dynamic rope": {**KEYS, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "encoder": {"model_type": "bert", **SMALL, "vocab_size": 50},
    "encoder-decoder": {"model_type": "bart", **BART, "decoder_layers": 1, "vocab_size": 50},
    "recurrent": {"model_type": "rnn", "hidden_size": 16, "vocab_size": 50},
    "seq2seq": {"model_type": "rnn_seq2seq", "hidden_size": 16, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
    "images": {"model_type": "vit", **SMALL, "image_size": 12, "patch_size": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_planned_and_timed(kind: str) -> None:
    model = on_paper(from_dict(KINDS[kind])).requires_grad_(True)
    small, large = (plan(model, any_objective, (rows, 10)).parts["activations"] for rows in (2, 6))
    assert 0 < small < large
    assert speed(model, any_objective, (2, 10), seconds=0.01) > 0


def test_parts_of_a_full_training() -> None:
    model = on_paper(from_dict(KEYS)).requires_grad_(True)
    made = plan(model, any_objective, (2, 16))
    size = sum(parameter.numel() for parameter in model.parameters())
    assert (made.weights, made.gradients, made.optimizer) == (4 * size, 4 * size, 8 * size)
    assert made.parameters == made.trainable == size
    # From the second micro-batch on, the gradients of those before are there from the start.
    assert plan(model, any_objective, (2, 16), micro_steps=2).peak_bytes > made.peak_bytes
    assert plan(model, any_objective, (2, 16), micro_steps=4, steps=3).passes == 12
    with_copy = plan(model, any_objective, (2, 16), checkpoint=True)
    assert with_copy.parts["checkpoint"] == 12 * size


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "muon"])
def test_the_optimizers_state_is_as_large_as_planned(name: str) -> None:
    model = build(from_dict({**KEYS, "hidden_size": 72, "intermediate_size": 80, "num_attention_heads": 9}))
    model.requires_grad_(True)
    optimizer = optimizer_from(model, Training(optimizer=name))
    clm(model, text(2, 8)).total.backward()
    optimizer.step()
    assert state_bytes(model, name) == pytest.approx(held_bytes(model, optimizer)["optimizer"], rel=0.02)


def test_rounded_weights_and_pages() -> None:
    model = on_paper(from_dict(KEYS)).requires_grad_(True)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert state_bytes(model, "adamw", "kahan") == 10 * size
    assert state_bytes(model, "paged_adamw", page_budget=1000) == 1000


def test_ranks_share_what_the_textbook_says() -> None:
    moments = ({"gradients": 400}, {"gradients": 300, "activations": 90, "logits": 10})
    made = Plan(1, 1, 1, weights=800, gradients=400, optimizer=1600, moments=moments, runtime=5)
    assert made.on(1, "ddp") == made.on(4, "ddp") == 800 + 1600 + 400 + 5
    assert made.on(4, "zero1") == 800 + 400 + 400 + 5
    assert made.on(4, "zero2") == 800 + 400 + 75 + 100 + 5
    assert made.on(4, "zero3") == 200 + 400 + 75 + 100 + 5
    cut = replace(made, divisible=4, whole_weights=80, whole_gradients=40)  # of all a tenth is whole on every rank
    assert cut.on(4, "tensor") == 80 + 720 // 4 + (30 + 270 // 4) + 100 + 160 + 1440 // 4 + 5
    assert made.parts["activations"] in (0, 90)
    assert replace(made, holes=0.5).on(4, "zero3") == 200 + 400 + 75 + 100 + 87 + 5
    assert replace(made, holes=0.5, passes=10).on(4, "zero3") == 200 + 400 + 75 + 100 + 2 * 87 + 5  # holes grow
    large = replace(made, holes=0.5, moments=({"activations": 10**9},))
    assert replace(large, passes=10).peak_bytes - large.peak_bytes == Tidy.SLACK  # until memory is given back
    assert replace(large, passes=10, varied=True).peak_bytes - large.peak_bytes == 10**9 // 2  # and are of no use
    # With one step the state comes when the activations are gone.
    assert replace(made, steps=1).on(1, "ddp") == 800 + 1600 + 400 + 5


@pytest.mark.parametrize("inputs, size", [(64, 64), (128, 231), (256, 64)])
def test_what_an_lstm_keeps_for_its_backward_pass_counts(inputs: int, size: int) -> None:
    """PyTorch says on paper that oneDNN keeps nothing; what it really keeps is the last thing that it returns."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("without oneDNN the LSTM is another one")
    kept: list[int] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mkldnn_rnn_layer.default:
                kept.append(found[3].nbytes)
            return found

    lstm, x_BTI = torch.nn.LSTM(inputs, size, batch_first=True), torch.zeros(4, 32, inputs)
    with Seen():
        lstm(x_BTI)
    ledger = Ledger(lambda tensor: "all", paper_of(paper := without_numbers(lstm)))
    with ledger:
        held = paper(x_BTI)
        counted = ledger.alive["all"]
    del held
    assert len(kept) == 1 and counted == pytest.approx(kept[0] + 4 * 32 * size * 4, rel=0.15)

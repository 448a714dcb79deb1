"""Published numbers about low-rank adaptation and cross-entropy, through the public API (exam rows 2, 6, 25 and 27)."""

from __future__ import annotations

import pytest
import torch

import bildung
from bildung.model.config import from_dict
from bildung.model.linear import deltas_off
from bildung.model.nested import use_rank
from bildung.train.objectives import surprisal
from bildung.train.optim import optimizer_from
from bildung.tune import dylora
from bildung.tune.lora import Settings, add_lora


def llama(**sizes):
    common = {"model_type": "llama", "vocab_size": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    with torch.device("meta" if sizes["hidden_size"] > 1000 else "cpu"):
        return bildung.build(from_dict(common | sizes))


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_exam_2_fifteen_times_fewer_parameters_than_120_by_120_is_rank_4():
    model = llama(hidden_size=120, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    found = {}
    for rank in range(1, 9):
        chosen = add_lora(model, Settings(data="none", rank=rank, target="q_proj"))
        assert [(linear.out_features, linear.in_features) for linear in chosen.values()] == [(120, 120)]
        found[rank] = trainable(model)
    assert {rank: count for rank, count in found.items() if 120 * 120 / count == 15} == {4: 960}


def test_exam_2_at_inference_the_base_is_kept_and_the_product_added():
    model = llama(hidden_size=120, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    (linear,) = add_lora(model, Settings(data="none", rank=4, alpha=4, target="q_proj")).values()
    base, delta = linear.base.dense().detach().clone(), linear.deltas["lora"]
    torch.nn.init.normal_(delta.lora_B)
    torch.testing.assert_close(linear.weight(), base + delta.lora_B @ delta.lora_A)
    assert torch.equal(linear.base.dense(), base)
    with deltas_off(model, "lora"):
        assert torch.equal(linear.weight(), base)


def test_q_and_v_of_llama_3_2_3b_at_rank_32_are_9_175_040_parameters():
    """peft's published result file for this model and configuration (method_comparison, LoRA r=32)."""
    model = llama(
        hidden_size=3072, intermediate_size=8, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8
    )
    add_lora(model, Settings(data="none", rank=32, target=["q_proj", "v_proj"]))
    assert trainable(model) == 9_175_040


def test_exam_6_cross_entropy_of_apple_banana_cherry():
    """p = (.1, .7, .2): 1.6094 nats if the next word is Cherry, 0.3567 if it is Banana."""
    model = llama(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        model.lm_head.base.weight.fill_(-1e4)
        model.lm_head.base.weight[:3] = torch.tensor([0.1, 0.7, 0.2]).log()[:, None] / 8
    cherry, banana = surprisal(model, torch.ones(2, 8), torch.tensor([2, 1])).tolist()
    assert (round(cherry, 4), round(banana, 4)) == (1.6094, 0.3567)
    assert cherry == pytest.approx(-torch.tensor(0.2).log().item())


def test_exam_25_dylora_chooses_no_rank_it_trains_all_so_that_any_can_be_cut():
    """The published answer: it selects the optimal rank. An update of rank b is alpha / b times the first b ranks."""
    options = dylora.Options(rank=4, alpha=6, seed=5)
    assert {dylora.rank_at(options, number) for number in range(100)} == {1, 2, 3, 4}
    model = llama(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    (linear,) = dylora.add_dylora(model, dylora.Options(rank=4, alpha=6, target="q_proj")).values()
    delta = linear.deltas["dylora"]
    torch.nn.init.normal_(delta.lora_B)
    for rank in (1, 2, 3, 4):
        use_rank(model, rank)
        expected = 6 / rank * delta.lora_B[:, :rank] @ delta.lora_A[:rank]
        torch.testing.assert_close(linear.weight() - linear.base.dense(), expected, atol=1e-5, rtol=1e-5)


def test_exam_27_lora_plus_is_a_higher_rate_for_b_and_leaves_clipping_alone():
    model = llama(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    given = Settings(data="none", rank=2, learning_rate=1e-4, learning_rate_ratio=16)
    add_lora(model, given)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer_from(model, given).param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if name.endswith("lora_A")} == {1e-4}
    assert {rate for name, rate in rates.items() if name.endswith("lora_B")} == {16 * 1e-4}
    assert given.clip == Settings(data="none").clip

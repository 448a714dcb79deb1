"""DoRA, PiSSA and (IA)³ against `peft`: files both ways, logits, the gradient of one step, and merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bildung
from bildung.core.errors import OutputError
from bildung.model import adapter_file
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.dora import DoRA
from bildung.model.ia3 import Rescale
from bildung.model.linear import linears, match_linears
from bildung.model.low_rank import LowRank, principal
from bildung.model.store import LanguageModel
from bildung.tune.merge import fold_deltas
from tests.model.tiny import tiny_lm
from tests.parity.test_peft_families import CONFIGS, TOKENS, close, logits_of, peer_logits, peer_of

LLAMA = dict(
    vocab_size=260, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=8,
    intermediate_size=40, max_position_embeddings=40, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    initializer_range=0.2,
)  # fmt: skip
ALL = {**CONFIGS, "llama": LLAMA}
TARGETS = {  # of (IA)³, in the words of the family's files: matrices, and those scaled at the input
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "gemma3_text": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "t5": (["k", "v", "wo"], ["wo"]),
}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def based(family: str, path: Path) -> Path:
    config = from_dict({"model_type": family, **ALL[family]})
    model = build(config, 3).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros would hide what is scaled and what is not
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return bildung.save(LanguageModel(model, tiny_lm().tokenizer, config), path / "base")


@pytest.fixture(params=ALL)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def theirs(base: Path, out: Path, config: Any) -> Any:
    """A peft model whose numbers are all random, and its directory."""
    torch.manual_seed(2)
    tuned = peft.get_peft_model(peer_of(base), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name or "ia3" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
    tuned.save_pretrained(out)
    return tuned.eval()


def config_of(method: str, family: str) -> Any:
    if method == "dora":
        return peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules="all-linear")
    matrices, inside = TARGETS[family]
    return peft.IA3Config(target_modules=matrices, feedforward_modules=inside)


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_what_peft_writes_loads_here_goes_back_and_merges(method: str, family: str, tmp_path: Path) -> None:
    base = based(family, tmp_path)
    expected = logits_of(theirs(base, tmp_path / "theirs", config_of(method, family)), peer=True)
    lm = bildung.load(tmp_path / "theirs")
    close(logits_of(lm.model, peer=False), expected)
    assert (expected - logits_of(bildung.load(base).model, peer=False)).abs().max() > 0.05
    bildung.save(lm, tmp_path / "back")
    close(peer_logits(base, tmp_path / "back"), expected)
    first, back = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("theirs", "back"))
    assert {key: tensor.shape for key, tensor in first.items()} == {key: tensor.shape for key, tensor in back.items()}
    assert all(torch.equal(first[key], back[key]) for key in first)
    fold_deltas(lm.model, torch.float32)
    assert not any(linear.deltas for linear in linears(lm.model).values())
    close(logits_of(lm.model, peer=False), expected)


def gradients_of_peft(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=TOKENS).logits.logsumexp(-1).square().sum().backward()
    return {
        name.replace(".default", "").removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def named_here(name: str) -> str:
    """peft's parameter as ours."""
    stem, _, leaf = name.removesuffix(".weight").rpartition(".")
    leaf = {
        "lora_A": "update.lora_A",
        "lora_B": "update.lora_B",
        "lora_magnitude_vector": "magnitude",
        "ia3_l": "factor",
    }[leaf]
    return f"{stem}.deltas.default.{leaf}"


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3"])
def test_the_gradient_of_one_step_is_that_of_peft(method: str, tmp_path: Path) -> None:
    base = based("llama", tmp_path)
    lora = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": method == "rslora"}
    config = peft.LoraConfig(**lora) if "lora" in method else config_of(method, "llama")
    peer = theirs(base, tmp_path / "theirs", config)
    peer.base_model.enable_adapter_layers()
    for name, parameter in peer.named_parameters():
        parameter.requires_grad_("lora_" in name or "ia3_" in name)
    expected = gradients_of_peft(peer)
    model = bildung.load(tmp_path / "theirs").model
    model(TOKENS).logsumexp(-1).square().sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if ".deltas." in name}
    assert len(ours) == len(expected) > 0
    for name, gradient in expected.items():
        own = named_here(name)
        mine = ours[own if own in ours else own.replace(".update.", ".")]
        torch.testing.assert_close(mine.flatten(), gradient.flatten(), atol=1e-4, rtol=1e-4)


def test_pissa_starts_where_peft_starts_and_is_saved_on_the_untouched_base(tmp_path: Path) -> None:
    """peft takes the principal part out of the base; here it is subtracted, and the file is what peft converts to."""
    base = based("llama", tmp_path)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    peer = peft.get_peft_model(peer_of(base), config)
    lm = bildung.load(base)
    for name, linear in match_linears(lm.model, "q_proj").items():
        weight_OI = linear.base.dense().detach().clone()
        linear.deltas["lora"] = delta = LowRank(linear.in_features, linear.out_features, 4, 6 / 4)
        delta.start_at(*(factor / 1.5**0.5 for factor in principal(weight_OI, 4)))
        their = peer.get_submodule(f"base_model.model.{name}")
        product = their.lora_B["default"].weight @ their.lora_A["default"].weight
        torch.testing.assert_close(delta.lora_B @ delta.lora_A, product, atol=2e-3, rtol=0)
        residual = linear.base.dense() - 1.5 * product
        torch.testing.assert_close(their.base_layer.weight, residual, atol=1e-5, rtol=0)
        assert torch.equal(linear.base.dense(), weight_OI)
    lm.model.eval()
    close(logits_of(lm.model, peer=False), logits_of(bildung.load(base).model, peer=False))
    for linear in match_linears(lm.model, "q_proj").values():
        nn.init.normal_(linear.deltas["lora"].lora_A, std=0.2)
    trained = logits_of(lm.model, peer=False)
    bildung.save(lm, tmp_path / "pissa")
    settings = json.loads((tmp_path / "pissa/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 12)
    close(peer_logits(base, tmp_path / "pissa"), trained)
    close(logits_of(bildung.load(tmp_path / "pissa").model, peer=False), trained)


STACKS = ["lora, dora", "dora, lora", "dora, dora, lora", "dora on q only"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("stack", STACKS)
def test_stacks_of_lora_and_dora_are_one_dora(stack: str, family: str, tmp_path: Path) -> None:
    lm = bildung.load(based(family, tmp_path))
    torch.manual_seed(4)
    for name, linear in match_linears(lm.model, "all").items():
        for number, kind in enumerate(stack.split(", ")):
            update = LowRank(linear.in_features, linear.out_features, 2 + number, 0.7)
            nn.init.normal_(update.lora_B, std=0.3)
            if "dora" in kind and ("only" not in kind or "q_proj" in name):
                linear.deltas[str(number)] = delta = DoRA(linear, update)
                delta.magnitude.data *= torch.empty_like(delta.magnitude).uniform_(0.5, 1.5)
            else:
                linear.deltas[str(number)] = update
    lm.model.eval()
    logits = logits_of(lm.model, peer=False)
    bildung.save(lm, tmp_path / "adapter")
    torch.testing.assert_close(peer_logits(tmp_path / "base", tmp_path / "adapter"), logits, atol=2e-4, rtol=1e-4)
    again = logits_of(bildung.load(tmp_path / "adapter").model, peer=False)
    torch.testing.assert_close(again, logits, atol=2e-4, rtol=1e-4)
    fold_deltas(lm.model, torch.float32)
    torch.testing.assert_close(logits_of(lm.model, peer=False), logits, atol=2e-4, rtol=1e-4)


def test_two_rescalings_are_one_and_another_method_beside_them_is_refused(tmp_path: Path) -> None:
    lm = bildung.load(based("llama", tmp_path))
    for linear in match_linears(lm.model, "k_proj").values():
        for name in ("first", "second"):
            linear.deltas[name] = delta = Rescale(linear.out_features, "output")
            nn.init.uniform_(delta.factor, 0.5, 1.5)
    logits = logits_of(lm.model, peer=False)
    bildung.save(lm, tmp_path / "adapter")
    close(peer_logits(tmp_path / "base", tmp_path / "adapter"), logits)
    linear = lm.model.linears()["model.layers.0.self_attn.q_proj"]
    linear.deltas["lora"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
    with pytest.raises(OutputError, match=r"low-rank deltas and \(IA\)³ vectors.*merge"):
        adapter_file.check_place(lm.model, lm.base)

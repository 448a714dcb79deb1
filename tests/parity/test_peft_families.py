"""Adapters of families whose files fuse, transpose or rename matrices go both ways between here and `peft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import bildung
from bildung.core.errors import AdapterError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import linears, match_linears
from bildung.model.low_rank import LowRank
from bildung.model.store import LanguageModel
from tests.model.tiny import tiny_lm

IDS = dict(bos_token_id=256, eos_token_id=257, pad_token_id=258, initializer_range=0.2)
BERT_SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": dict(vocab_size=260, n_embd=24, n_layer=2, n_head=3, n_positions=40, n_inner=50, **IDS),
    "gpt_neox": dict(vocab_size=260, **BERT_SIZES, max_position_embeddings=40, rotary_pct=0.5, **IDS),
    "gemma3_text": dict(vocab_size=260, **BERT_SIZES, num_key_value_heads=1, head_dim=10, **IDS),
    "bert": dict(vocab_size=260, **BERT_SIZES, architectures=["BertForMaskedLM"], **IDS),
    "t5": dict(
        vocab_size=260, d_model=24, d_kv=10, d_ff=50, num_layers=2, num_heads=3, decoder_start_token_id=258,
        eos_token_id=257, pad_token_id=258,
    ),
}  # fmt: skip
PEERS = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
TOKENS = torch.randint(3, 250, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, tmp_path: Path) -> Path:
    config = from_dict({"model_type": family, **CONFIGS[family]})
    return bildung.save(LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config), tmp_path / "base")


def peer_of(base: Path) -> Any:
    model_type = json.loads((base / "config.json").read_text())["model_type"]
    return PEERS.get(model_type, transformers.AutoModelForCausalLM).from_pretrained(base)


def logits_of(model: Any, peer: bool) -> Tensor:
    pair = (TOKENS, TOKENS[:, :5])
    with torch.no_grad():
        if not peer:
            return model(*pair) if model.config.kind == "encoder-decoder" else model(TOKENS)
        if model.config.is_encoder_decoder:
            return model(input_ids=pair[0], decoder_input_ids=pair[1]).logits
        return model(input_ids=TOKENS).logits


def peer_logits(base: Path, adapter: Path) -> Tensor:
    return logits_of(peft.PeftModel.from_pretrained(peer_of(base), adapter).eval(), peer=True)


def make_adapter(base: Path, out: Path, **settings: Any) -> Path:
    tuned = peft.get_peft_model(
        peer_of(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings})
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(out)
    return out


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_adapters_of_peft_load_here_and_go_back_at_their_rank(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    lm = bildung.load(adapter)
    expected = peer_logits(base, adapter)
    close(logits_of(lm.model, peer=False), expected)
    assert (expected - logits_of(bildung.load(base).model, peer=False)).abs().max() > 0.05
    bildung.save(lm, tmp_path / "back")
    theirs, ours = (load_file(one / "adapter_model.safetensors") for one in (adapter, tmp_path / "back"))
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("case", ["all", "q and v", "twice", "scaled apart"])
def test_adapters_made_here_load_in_peft(case: str, base: Path, tmp_path: Path) -> None:
    lm = bildung.load(base)
    torch.manual_seed(5)
    pattern: Any = ("q_proj", "v_proj") if case == "q and v" else "all"
    for name, linear in match_linears(lm.model, pattern).items():
        rank = 5 if case == "scaled apart" and "k_proj" in name else 3
        scaling = 0.4 if case == "scaled apart" and "v_proj" in name else 1.3
        for delta in ("first", "second")[: 2 if case == "twice" else 1]:
            linear.deltas[delta] = LowRank(linear.in_features, linear.out_features, rank, scaling)
            nn.init.normal_(linear.deltas[delta].lora_B, std=0.3)
    lm.model.eval()
    logits = logits_of(lm.model, peer=False)
    bildung.save(lm, tmp_path / "adapter")
    close(logits, peer_logits(base, tmp_path / "adapter"))
    close(logits_of(bildung.load(tmp_path / "adapter").model, peer=False), logits)


def test_fused_ranks_are_the_smallest_that_are_exact(tmp_path: Path) -> None:
    """q, k and v of rank 2 each: a fused adapter of rank 6; q alone: rank 2. Loaded again, each has rank 2."""
    config = from_dict({"model_type": "gpt2", **CONFIGS["gpt2"]})
    base = bildung.save(LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config), tmp_path / "base")
    for pattern, rank in ((("q_proj", "k_proj", "v_proj"), 6), (("q_proj",), 2)):
        lm = bildung.load(base)
        for linear in match_linears(lm.model, pattern).values():
            linear.deltas["tuned"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
            nn.init.normal_(linear.deltas["tuned"].lora_B)
        out = bildung.save(lm, tmp_path / f"adapter{rank}")
        tensors = load_file(out / "adapter_model.safetensors")
        assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (rank, 24)
        assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is True
        again = {name: one for name, one in linears(bildung.load(out).model).items() if one.deltas}
        assert {name.rsplit(".", 1)[-1] for name in again} == set(pattern)
        assert all(one.deltas["default"].rank == 2 for one in again.values())


def test_an_untrained_adapter_keeps_its_room(tmp_path: Path) -> None:
    """B is zero at the start of training, and nothing of the adapter may be dropped for that."""
    config = from_dict({"model_type": "gpt2", **CONFIGS["gpt2"]})
    base = bildung.save(LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config), tmp_path / "base")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        tuned = peft.get_peft_model(peer_of(base), peft.LoraConfig(r=4, target_modules=["c_attn"]))
    tuned.save_pretrained(tmp_path / "adapter")
    deltas = [one.deltas["default"] for one in linears(bildung.load(tmp_path / "adapter").model).values() if one.deltas]
    assert [delta.rank for delta in deltas] == [4] * 6


def test_an_adapter_of_another_family_is_refused(tmp_path: Path) -> None:
    bases = {}
    for family in ("gpt2", "gpt_neox"):
        config = from_dict({"model_type": family, **CONFIGS[family]})
        lm = LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config)
        bases[family] = bildung.save(lm, tmp_path / family)
    adapter = make_adapter(bases["gpt_neox"], tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(bases["gpt2"])}))
    with pytest.raises(AdapterError, match=r"made for a matrix 'gpt_neox\.layers\.0"):
        bildung.load(adapter)


def test_an_adapter_on_the_unembedding_has_the_name_of_transformers_module(tmp_path: Path) -> None:
    """GPT-NeoX files say embed_out, transformers' class lm_head, and peft goes by the class."""
    config = from_dict({"model_type": "gpt_neox", **CONFIGS["gpt_neox"]})
    base = bildung.save(LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config), tmp_path / "base")
    lm = bildung.load(base)
    lm.model.lm_head.deltas["tuned"] = delta = LowRank(24, 260, 2, 1.0)
    nn.init.normal_(delta.lora_B)
    bildung.save(lm, tmp_path / "adapter")
    close(logits_of(lm.model, peer=False), peer_logits(base, tmp_path / "adapter"))

"""Quantized models of families whose files fuse or transpose matrices: read here, stopped at elsewhere, never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import bildung
from bildung.core.errors import OutputError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import METHODS
from bildung.model.store import LanguageModel
from tests.model.tiny import tiny_lm

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": dict(vocab_size=260, n_embd=192, n_layer=2, n_head=3, n_positions=40, n_inner=320),
    "gpt_neox": dict(
        vocab_size=260, hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=320
    ),
}
TOKENS = torch.randint(3, 250, (2, 11), generator=torch.Generator().manual_seed(1))


def quantized(family: str, method: str, target: Any = "all") -> LanguageModel:
    config = from_dict({"model_type": family, **SIZES[family], "bos_token_id": 256, "eos_token_id": 257})
    lm = LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config)
    replace_stores(lm.model, target, lambda linear: METHODS[method].quantize(linear.base.dense().detach()))
    return lm


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_bit_equal_and_peers_stop(family: str, method: str, tmp_path: Path) -> None:
    lm = quantized(family, method)
    out = bildung.save(lm, tmp_path / "out")
    again = bildung.load(out)
    assert torch.equal(again.model(TOKENS), lm.model(TOKENS))
    assert {type(one.base) for name, one in again.model.linears().items() if name != "lm_head"} == {METHODS[method]}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # not: random matrices, and a report of them
        transformers.AutoModelForCausalLM.from_pretrained(out)
    twice, once = (load_file(d / "model.safetensors") for d in (bildung.save(again, tmp_path / "twice"), out))
    assert set(twice) == set(once) and all(torch.equal(twice[key], once[key]) for key in once)


def test_an_adapter_over_a_quantized_fused_base(tmp_path: Path) -> None:
    base = bildung.save(quantized("gpt2", "nf4"), tmp_path / "base")
    lm = bildung.load(base)
    for linear in lm.model.linears().values():
        linear.deltas["tuned"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
        torch.nn.init.normal_(linear.deltas["tuned"].lora_B, std=0.1)
    del lm.model.lm_head.deltas["tuned"]
    lm.model.eval()
    again = bildung.load(bildung.save(lm, tmp_path / "adapter"))
    torch.testing.assert_close(again.model(TOKENS), lm.model(TOKENS), atol=1e-5, rtol=1e-5)


def test_a_fused_matrix_is_not_quantized_in_part(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"k_proj is dense.*Quantize all of its parts"):
        bildung.save(quantized("gpt2", "int8", "q_proj"), tmp_path / "out")


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96),
    "roberta": dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, pad_token_id=1),
    "distilbert": dict(dim=64, n_layers=1, n_heads=4, hidden_dim=96),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ENCODERS)
def test_matrices_left_dense_are_named_as_others_call_them(family: str, tmp_path: Path) -> None:
    """Or transformers looks for a quantized unembedding, which is not in the file."""
    cls = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[family] + "ForMaskedLM"
    config = from_dict({"model_type": family, **ENCODERS[family], "vocab_size": 260, "architectures": [cls]})
    lm = LanguageModel(build(config, 3).eval(), tiny_lm().tokenizer, config)
    for method in METHODS:
        other = LanguageModel(build(config, 3).eval(), lm.tokenizer, config)
        replace_stores(
            other.model, "all", lambda one, method=method: METHODS[method].quantize(one.base.dense().detach())
        )
        out = bildung.save(other, tmp_path / method)
        said = json.loads((out / "config.json").read_text())["quantization_config"]
        place = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "distilbert": "vocab_projector"}
        assert said["ignore" if method == "int8" else "llm_int8_skip_modules"] == [place[family]]
        if method == "int8":
            peer = getattr(transformers, cls).from_pretrained(out)
            with torch.no_grad():
                torch.testing.assert_close(peer(TOKENS).logits, other.model(TOKENS), atol=1e-5, rtol=1e-4)

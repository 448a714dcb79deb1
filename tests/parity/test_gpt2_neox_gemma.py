"""GPT-2, GPT-NeoX and Gemma 3 against transformers: logits, files, config keys; and mutants that must fail.

As in test_decoder_families.py, every dimension has another size and weights are large.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from bildung.core.errors import ConfigError
from bildung.model import layers, transformer
from bildung.model.config import from_dict, read_config
from bildung.model.safetensors_file import read_tensors
from bildung.model.store import assemble, state_tensors

GPT2 = dict(vocab_size=101, n_embd=48, n_layer=3, n_head=6, n_positions=64, n_inner=80, initializer_range=0.2)
NEOX = dict(
    vocab_size=101,
    hidden_size=80,
    num_hidden_layers=3,
    num_attention_heads=5,
    intermediate_size=72,
    max_position_embeddings=64,
    initializer_range=0.2,
)
GEMMA = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    initializer_range=0.2,
    sliding_window=5,
    query_pre_attn_scalar=14,
    sliding_window_pattern=3,
)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
ROPES = dict(
    full_attention=dict(rope_type="linear", factor=4.0, rope_theta=5000.0),
    sliding_attention=dict(rope_type="default", rope_theta=300.0),
)
PARTIAL = dict(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.5)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-four-times": ("GPT2", {**GPT2, "n_inner": None, "activation_function": "gelu"}),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False}),
    "neox": ("GPTNeoX", NEOX),
    "neox-serial": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "rope_parameters": PARTIAL}),
    "neox-no-bias": ("GPTNeoX", {**NEOX, "attention_bias": False, "hidden_act": "gelu_new"}),
    "neox-tied": ("GPTNeoX", {**NEOX, "tie_word_embeddings": True, "rotary_pct": 1.0, "rotary_emb_base": 700}),
    "gemma": ("Gemma3Text", GEMMA),
    "gemma-types": (
        "Gemma3Text",
        {**GEMMA, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 3, "rope_parameters": ROPES},
    ),
    "gemma-cap": (
        "Gemma3Text",
        {**GEMMA, "final_logit_softcapping": 3.0, "attention_bias": True, "eos_token_id": [2, 5]},
    ),
    "gemma-untied": ("Gemma3Text", {**GEMMA, "tie_word_embeddings": False}),
}


def peer_of(name: str) -> Any:
    family, settings = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**{**TOKENS, **settings})
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    for key, parameter in peer.named_parameters():
        if "norm" in key or ".ln_" in key or key.endswith("bias"):
            # A Gemma norm is 1 + weight; transformers leaves ones and zeros, which would hide a swap.
            nn.init.normal_(parameter, 0.0 if family == "Gemma3Text" else 1.0, 0.3)
    return peer


def both(name: str, directory: Path) -> tuple[Any, transformer.Decoder]:
    peer = peer_of(name)
    peer.save_pretrained(directory)
    return peer, assemble(read_config(directory), dict(read_tensors(directory)))


def worst(peer: Any, ours: transformer.Decoder) -> float:
    tokens = torch.randint(0, 101, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((peer(input_ids=tokens).logits - ours(tokens)).abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_and_files_come_back(name: str, tmp_path: Path) -> None:
    peer, ours = both(name, tmp_path)
    assert worst(peer, ours) < 1e-5
    theirs, back = load_file(tmp_path / "model.safetensors"), state_tensors(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_equals_uncached_beyond_the_window(name: str, tmp_path: Path) -> None:
    _, ours = both(name, tmp_path)
    tokens = torch.randint(0, 101, (2, 23), generator=torch.Generator().manual_seed(1))
    cache = ours.kv_cache(2, 23)
    with torch.no_grad():
        pieces = [ours(piece, kv_cache=cache) for piece in tokens.split([9, *[1] * 8, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), ours(tokens), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma"])
def test_every_key_that_transformers_writes_is_known(name: str) -> None:
    raw = json.loads(peer_of(name).config.to_json_string(use_diff=False))
    config = from_dict(raw)
    assert config.bos_token_id == 1 and config.eos_token_ids == (2,) and config.pad_token_id == 0
    with pytest.raises(ConfigError, match="unknown key 'hidden_szie'"):
        from_dict({**raw, "hidden_szie": 4})


CHANGED = {
    "gpt2": dict(
        scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, add_cross_attention=True, n_head=5, n_ctx=9
    ),
    "neox": dict(rope_parameters={"partial_rotary_factor": 1.5}, num_attention_heads=7, rotary_pct=0.2),
    "gemma": dict(
        attn_logit_softcapping=50.0,
        use_bidirectional_attention=True,
        layer_types=["full_attention"],
        query_pre_attn_scalar=0,
        rope_parameters={"rope_type": "yarn", "factor": 2.0},
    ),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in CHANGED.items() for key in keys])
def test_values_that_are_not_built_here_are_refused(name: str, key: str) -> None:
    raw = json.loads(peer_of(name).config.to_json_string())
    if key == "rotary_pct":  # the older form; 0.2 · 16 dimensions are three, and three are no pairs
        raw.pop("rope_parameters")
    with pytest.raises(ConfigError):
        from_dict({**raw, key: CHANGED[name][key]})


def no_offset(self: layers.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


MUTANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", dict(hidden_act="relu")),
    ("gpt2", dict(positions="none")),
    ("gpt2", dict(norm_eps=0.1)),
    ("neox", dict(parallel_residual=False)),
    ("neox-serial", dict(parallel_residual=True)),
    ("neox", dict(rotary_dim=None)),
    ("neox", dict(hidden_act="silu")),
    ("gemma", dict(windows=(None,) * 5)),
    ("gemma", dict(local_rope=None)),
    ("gemma", dict(embed_scale=1.0)),
    ("gemma", dict(norm_offset=0.0)),
    ("gemma", dict(attention_scale=None)),
    ("gemma", dict(hidden_act="silu")),
    ("gemma-cap", dict(logit_softcap=None)),
]


@pytest.mark.parametrize(("name", "change"), MUTANTS)
def test_mutants_of_the_config_fail(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    peer, ours = both(name, tmp_path)
    weights = ours.state_dict()
    config = from_dict(json.loads(peer.config.to_json_string()))
    for field, value in change.items():
        assert getattr(config, field) != value
        object.__setattr__(config, field, value)
    mutant = transformer.Decoder(config)
    mutant.load_state_dict(weights, strict=False)
    mutant.tie()
    assert worst(peer, mutant.eval()) > 1e-3


@pytest.mark.parametrize("wrong", ["blocks", "heads", "order"])
def test_mutants_of_the_fused_matrix_fail(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q, k and v read as blocks where they are ordered by head, and the other way round."""
    from bildung.model.families import gpt2, gpt_neox
    from bildung.model.names import Stored

    family, name = (gpt_neox, "neox") if wrong == "blocks" else (gpt2, "gpt2")
    names = family.names(read_config_of(name))
    for key, stored in names.items():
        if isinstance(stored, Stored) and stored.parts == 3:
            heads = {"blocks": 0, "heads": 6, "order": 0}[wrong]
            part = 2 - stored.part if wrong == "order" else stored.part
            names[key] = Stored(stored.name, part, 3, heads, stored.transposed)
    monkeypatch.setattr(family, "names", lambda config: names)
    peer, ours = both(name, tmp_path)
    assert worst(peer, ours) > 1e-3


def read_config_of(name: str) -> Any:
    return from_dict(json.loads(peer_of(name).config.to_json_string()))


def test_files_of_gpt2_without_the_prefix(tmp_path: Path) -> None:
    """The published checkpoints' layout: no `transformer.`, and the causal mask among the tensors."""
    peer, _ = both("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(tensors, file)
    ours = assemble(read_config(tmp_path), dict(read_tensors(tmp_path)))
    assert worst(peer, ours) < 1e-5
    assert "transformer.h.0.attn.c_attn.weight" in state_tensors(ours)


def test_a_bare_gpt2_has_its_embedding_for_a_head(tmp_path: Path) -> None:
    peer = peer_of("gpt2")
    peer.transformer.save_pretrained(tmp_path)
    assert worst(peer, assemble(read_config(tmp_path), dict(read_tensors(tmp_path)))) < 1e-5


def test_the_image_reading_gemma_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="text half alone has model_type 'gemma3_text'"):
        from_dict({"model_type": "gemma3", "text_config": {}})

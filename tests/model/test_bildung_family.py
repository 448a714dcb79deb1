"""model_type `bildung`: every choice of the config as a key, wrong ones refused, and peers that decline politely."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bildung
from bildung.core.errors import ConfigError
from bildung.model.build import build
from bildung.model.config import ModelConfig, from_dict
from bildung.model.families.bildung import CHOICES, ELSEWHERE
from bildung.model.store import LanguageModel
from bildung.model.taps import match_sites, observe
from tests.model.tiny import tiny_lm

SMALL: dict[str, Any] = dict(
    model_type="bildung", vocab_size=260, hidden_size=24, num_hidden_layers=2, num_attention_heads=3
)
# One value besides the default for every choice; what a choice needs to be of use stands with it.
OTHER: dict[str, dict[str, Any]] = {
    "kind": dict(kind="encoder", heads=["mlm"]),
    "vocab_size": dict(vocab_size=261),
    "hidden_size": dict(hidden_size=36),
    "num_hidden_layers": dict(num_hidden_layers=1),
    "max_position_embeddings": dict(max_position_embeddings=99),
    "tie_word_embeddings": dict(tie_word_embeddings=True),
    "initializer_range": dict(initializer_range=0.3),
    "intermediate_size": dict(intermediate_size=50),
    "num_attention_heads": dict(num_attention_heads=2),
    "num_key_value_heads": dict(num_key_value_heads=1),
    "head_dim": dict(head_dim=10),
    "norm": dict(norm="batch"),
    "norm_eps": dict(norm_eps=0.1),
    "norm_offset": dict(norm_offset=1.0),
    "norm_placement": dict(norm_placement="sandwich"),
    "parallel_residual": dict(parallel_residual=True),
    "embed_norm": dict(embed_norm=True),
    "final_norm": dict(final_norm=False),
    "layer_scale": dict(layer_scale=0.5),
    "drop_path": dict(drop_path=0.1),
    "hidden_act": dict(hidden_act="relu"),
    "gated": dict(gated=False),
    "mlp": dict(mlp=False),
    "positions": dict(positions="t5"),
    "rope": dict(rope={"theta": 500.0}),
    "local_rope": dict(local_rope={"theta": 500.0}, windows=[None, 4]),
    "rotary_dim": dict(rotary_dim=4),
    "relative_buckets": dict(relative_buckets=8, positions="t5"),
    "relative_max_distance": dict(relative_max_distance=40, positions="t5"),
    "causal": dict(causal=False),
    "prefix_lm": dict(prefix_lm="source"),
    "qkv_bias": dict(qkv_bias=True),
    "o_bias": dict(o_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "head_bias": dict(head_bias=True),
    "qk_norm": dict(qk_norm=True),
    "attention_scale": dict(attention_scale=0.5),
    "attention_softcap": dict(attention_softcap=1.0),
    "attention_sinks": dict(attention_sinks=True),
    "logit_softcap": dict(logit_softcap=0.1),
    "windows": dict(windows=[None, 4]),
    "embed_scale": dict(embed_scale=3.0),
    "logit_scale": dict(logit_scale=3.0),
    "embed_dropout": dict(embed_dropout=0.1),
    "attention_dropout": dict(attention_dropout=0.1),
    "residual_dropout": dict(residual_dropout=0.1),
    "activation_dropout": dict(activation_dropout=0.1),
    "final_dropout": dict(final_dropout=0.1),
    "init": dict(init="xavier"),
    "token_types": dict(token_types=2, kind="encoder", heads=["mlm"]),
    "heads": dict(heads=["mlm", "pooler"], kind="encoder"),
    "num_labels": dict(num_labels=3, kind="encoder", heads=["classify"]),
    "classifier_dropout": dict(classifier_dropout=0.1, num_labels=3, kind="encoder", heads=["classify"]),
}
TOKENS = torch.randint(3, 250, (2, 11), generator=torch.Generator().manual_seed(1))


def made(**changes: Any) -> LanguageModel:
    config = from_dict({**SMALL, **changes})
    return LanguageModel(build(config).eval(), tiny_lm().tokenizer, config)


def test_every_field_of_the_config_is_a_choice_or_belongs_elsewhere() -> None:
    assert set(OTHER) == set(CHOICES) == {field.name for field in fields(ModelConfig)} - ELSEWHERE


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_reaches_the_model_and_the_directory(choice: str, tmp_path: Path) -> None:
    lm = made(**OTHER[choice])
    assert getattr(lm.config, choice) != getattr(made().config, choice)
    out = bildung.save(lm, tmp_path / "out")
    again = bildung.load(out)
    assert again.config == lm.config
    assert torch.equal(again.model.hidden(TOKENS), lm.model.hidden(TOKENS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": "alibbi"}, "positions = 'alibbi'.*'alibi'"),
        ({"qk_norm": "yes"}, "qk_norm = 'yes'.*valid boolean"),
        ({"windows": [4]}, "1 attention windows for 2 layers"),
        ({"windows": [0, None]}, "from 1, or null"),
        ({"num_attention_heads": 5}, "24 does not divide into 5 attention heads"),
        ({"num_key_value_heads": 2}, "3 is not a multiple of num_key_value_heads = 2"),
        ({"rope": {"thta": 2}}, "rope has no 'thta'.*did you mean 'theta'"),
        ({"hidden_szie": 2}, "unknown key 'hidden_szie'.*did you mean 'hidden_size'"),
        ({"kind": "vision"}, "allowed: 'decoder', 'encoder'"),
        ({"attention_softcap": 0.0}, "must be positive"),
        ({"embed_dropout": 1.0}, r"lie in \[0, 1\)"),
        ({"parallel_residual": True, "norm_placement": "post"}, "would do nothing"),
        ({"layer_scale": 0.1, "norm_placement": "post"}, "would do nothing"),
        ({"rotary_dim": 4, "positions": "t5"}, "would do nothing"),
        ({"mlp": False, "intermediate_size": 50}, "would do nothing: there is no feed-forward layer"),
        ({"mlp": False, "gated": True}, "would do nothing: there is no feed-forward layer"),
        ({"prefix_lm": "text", "causal": False}, "would do nothing: all tokens see all others"),
        ({"prefix_lm": "prose"}, "prefix_lm = 'prose'.*'text' or 'source'"),
        ({"local_rope": {"theta": 5.0}}, "no layer has a window"),
        ({"relative_buckets": 2, "positions": "t5"}, "at least 4"),
        ({"rope": {"factor": 2.0}, "positions": "t5"}, "would do nothing"),
        ({"rope": {"kind": "lenear", "factor": 2.0}}, "rope.kind = 'lenear'.*'linear'"),
        ({"rope": {"kind": "linear", "factor": -2.0}}, "RoPE with factor = -2.0; it must be positive"),
        ({"relative_buckets": 8}, "would do nothing: they are T5's"),
        ({"heads": ["mlm"]}, "a decoder has its unembedding alone"),
        ({"token_types": 2}, "would do nothing"),
        ({"kind": "encoder", "heads": ["mln"]}, "heads has 'mln'.*did you mean 'mlm'"),
        ({"kind": "encoder", "heads": ["mlm"], "head_bias": True}, "would do nothing"),
        ({"kind": "encoder", "heads": ["mlm"], "num_labels": 3}, "no head tells classes apart"),
        ({"kind": "encoder", "heads": ["tag"]}, "'tag' needs num_labels"),
        ({"kind": "encoder", "heads": ["tag"], "num_labels": 3, "classifier_dropout": 1.5}, r"lie in \[0, 1\)"),
        ({"kind": "encoder", "heads": ["classify", "classify_tanh"], "num_labels": 2}, "by one of them"),
        ({"initializer_range": -0.1}, "must not be negative"),
        ({"hidden_act": "gellu"}, "activation 'gellu' is not known.*did you mean 'gelu'"),
        ({"model_type": "bildug"}, "known: .*did you mean 'bildung'"),
    ],
)
def test_wrong_choices_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(**changes)


def test_heads_that_do_not_divide_are_refused_by_every_family_that_divides() -> None:
    for raw in (
        dict(model_type="llama", vocab_size=9, hidden_size=10, intermediate_size=4, num_hidden_layers=1,
             num_attention_heads=3, max_position_embeddings=8),
        dict(model_type="gpt2", n_embd=10, n_head=3),
        dict(model_type="gpt_neox", hidden_size=10, num_attention_heads=3),
        dict(model_type="bert", hidden_size=10, num_attention_heads=3),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="10 does not divide into 3 attention heads"):
            from_dict(raw)


def test_peers_say_that_they_do_not_know_it(tmp_path: Path) -> None:
    out = bildung.save(made(), tmp_path / "out")
    with pytest.raises(ValueError, match="model type `bildung`"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_attention_alone_is_the_stream_plus_what_attention_adds(placement: str) -> None:
    lm = made(mlp=False, norm_placement=placement)
    assert not [name for name in lm.model.linears() if "mlp" in name]
    assert not any("mlp" in site for site in lm.model.sites)
    with observe(lm.model, match_sites(lm.model, "layers.*")) as seen:
        lm.model(TOKENS)
    assert set(seen) == set(match_sites(lm.model, "layers.*"))  # every site that is listed exists
    assert torch.equal(seen["layers.0.resid_post"], seen["layers.0.resid_mid"])
    if placement == "pre":
        added = seen["layers.0.resid_pre"] + seen["layers.0.attn.out"]
        assert torch.equal(seen["layers.0.resid_post"], added)

"""config.json: every key honoured or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from bildung.core.errors import ConfigError
from bildung.model.config import Rope, from_dict, read_config
from tests.model.tiny import CONFIG


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_everything_transformers_writes_is_accounted_for(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=2)
    for text in (config.to_json_string(use_diff=True), config.to_json_string(use_diff=False)):
        ours = from_dict(json.loads(text))
        assert ours.num_hidden_layers == 2 and ours.head_dim == 128 and ours.norm_eps == 1e-6


def test_both_forms_of_rope_scaling_are_read() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **scaling}}
    expected = Rope(theta=5e5, kind="llama3", **scaling)  # type: ignore[arg-type]
    assert from_dict({**CONFIG, **old}).rope == from_dict({**CONFIG, **new}).rope == expected
    assert from_dict({**CONFIG, "rope_scaling": {"type": "linear", "factor": 2.0}}).rope.factor == 2.0


def test_windows_follow_each_familys_rule() -> None:
    assert from_dict({**CONFIG, "model_type": "mistral", "sliding_window": 7}).windows == (7, 7)
    qwen = {**CONFIG, "model_type": "qwen2", "sliding_window": 7, "max_window_layers": 1}
    assert from_dict(qwen).windows == (None, None)
    assert from_dict({**qwen, "use_sliding_window": True}).windows == (None, 7)
    kinds = ["sliding_attention", "full_attention"]
    assert from_dict({**qwen, "use_sliding_window": True, "layer_types": kinds}).windows == (7, None)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"model_type": "lama"}, "did you mean 'llama'"),
    "no architecture": ({"model_type": None}, "known: .*llama"),
    "unknown key": ({"rms_norm_epsilon": 1e-5}, "unknown key 'rms_norm_epsilon'.*did you mean 'rms_norm_eps'"),
    "missing key": ({"vocab_size": None}, "lacks the key 'vocab_size'"),
    "wrong activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; allowed: 'silu'"),
    "remote code": ({"auto_map": {"AutoModel": "evil.py"}}, "never done here"),
    "text for a number": ({"hidden_size": "64"}, "hidden_size = '64'; it must be a positive whole number"),
    "negative size": ({"num_hidden_layers": -1}, "positive whole number"),
    "heads do not divide": ({"num_key_value_heads": 4}, "not a multiple"),
    "unknown rope": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "allowed: default, linear, ntk"),
    "rope lacks factor": ({"rope_scaling": {"rope_type": "linear"}}, "needs a positive factor"),
    "infinite eps": ({"rms_norm_eps": float("inf")}, "must be a number"),
    "attention dropout": ({"attention_dropout": 1.5}, "must lie in"),
    "odd head": ({"head_dim": 7}, "odd"),
    "more layers than memory": ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000; at most"),
    "negative eps": ({"rms_norm_eps": -1e-5}, "must not be negative"),
    "rope is text": ({"rope_scaling": "linear"}, "not a JSON object"),
    "rope kind is a list": ({"rope_parameters": {"rope_type": ["linear"]}}, "allowed: default, linear, ntk"),
    "rope theta is text": ({"rope_parameters": {"rope_theta": "1e4"}}, "positive number"),
    "rope theta is zero": ({"rope_theta": 0}, "positive number"),
    "rope factor is infinite": (
        {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}},
        "needs a positive factor",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_honoured_is_refused(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        from_dict({**CONFIG, **change})


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)  # Python's JSON reader gives up with a RecursionError
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="JSON object"):
        read_config(tmp_path)

"""PREFIX_TUNING: the keys and values of virtual tokens (virtual.py) in PEFT's file, one tensor

    prompt_embeddings (m, layers * 2 * kv heads * head dim)      [layer 0: keys, rotated; values; layer 1: ...]

A prefix that `peft` trained through an MLP (prefix_projection) holds the MLP's output, so nothing of the MLP is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from bildung.model import adapter_prompt
from bildung.model.virtual import Prefix, add_virtual, check_decoder, prefix_size, virtual_of

WHAT, DELTAS = "a prefix of keys and values", ()
REQUIRED = adapter_prompt.REQUIRED
INERT = set(
    "num_virtual_tokens token_dim num_attention_heads num_layers prefix_projection encoder_hidden_size "
    "init_weights".split()
)


def check(given: dict[str, Any], path: Path) -> None:
    """Nothing in the config beyond what the tensor's shape says again."""


def add_to(model: Any, path: Path, settings: dict[str, Any], name: str) -> None:
    """Put the file's keys and values before what `model` reads. Raises AdapterError when they do not fit it."""
    check_decoder(model, 1)  # other kinds have no size of a prefix
    tensor = adapter_prompt.read_tensor(model, path, settings, prefix_size(model.config))
    add_virtual(model, Prefix(model.config, tensor))


def holds(model: Any) -> bool:
    """Whether the model reads such a prefix."""
    return isinstance(virtual_of(model), Prefix)


def parts(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the config's keys, the tensors). Width and heads are those of the keys and values, grouped or not."""
    prefix_MF, config = model.model.virtual.values_MF(), model.config
    width = config.num_key_value_heads * config.head_dim
    described = {
        "num_virtual_tokens": len(prefix_MF),
        "num_transformer_submodules": 1,
        "token_dim": width,
        "num_attention_heads": config.num_key_value_heads,
        "num_layers": config.num_hidden_layers,
        "prefix_projection": False,
        "encoder_hidden_size": width,
    }
    return described, {adapter_prompt.TENSOR: prefix_MF}

"""Virtual tokens on disk in PEFT's format: adapter_config.json, and adapter_model.safetensors with one tensor.

    PROMPT_TUNING    prompt_embeddings (m, hidden)                      vectors
    PREFIX_TUNING    prompt_embeddings (m, layers * 2 * kv heads * head dim)    keys, rotated, and values

`peft` opens what is written here, and the other way round, with equal logits: there, too, virtual tokens take the
positions 0 .. m-1 and the tokens go on from m. A prefix that peft trained through an MLP (prefix_projection) holds the
MLP's output, so nothing of the MLP is needed. What a prompt started from is in the record, not in the config: `peft`
would look for the tokenizer again.
"""

# M virtual tokens, D hidden_size, F numbers of a virtual token: D, or layers * 2 * K * H

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import AdapterError, OutputError, nearest
from bildung.model.adapter_file import CONFIG, TENSORS
from bildung.model.base import Model
from bildung.model.config import ModelConfig
from bildung.model.safetensors_file import read_file, write_file
from bildung.model.virtual import Prefix, Prompt, add_virtual, check_decoder, prefix_size, virtual_of

PROMPT, PREFIX = "PROMPT_TUNING", "PREFIX_TUNING"
TENSOR = "prompt_embeddings"

# Keys that say how it was made, or what the tensor's shape says again.
INERT = set(
    "peft_type task_type base_model_name_or_path num_virtual_tokens token_dim num_attention_heads num_layers revision "
    "inference_mode auto_mapping peft_version prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path "
    "tokenizer_kwargs prefix_projection encoder_hidden_size init_weights".split()
)


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, every key accounted for. Raises AdapterError."""
    path = directory / CONFIG
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(given, dict) or given.get("peft_type") not in (PROMPT, PREFIX):
        raise AdapterError(f"{path} does not describe virtual tokens; peft_type must be {PROMPT} or {PREFIX}.")
    if given.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(
            f"{path}: num_transformer_submodules = {given['num_transformer_submodules']!r}; virtual tokens in both "
            f"halves of an encoder-decoder are not supported, only 1."
        )
    for key, value in given.items():
        if key not in INERT | {"num_transformer_submodules"} and value not in (None, False, {}, []):
            raise AdapterError(f"{path}: unknown key {key!r} = {value!r}. {nearest(key, INERT)}")
    if not isinstance(given.get("base_model_name_or_path"), str | None):
        raise AdapterError(f"{path}: base_model_name_or_path must be a path.")
    return given


def add_to(model: Model, directory: Path, settings: dict[str, Any]) -> None:
    """Put the directory's virtual tokens before what `model` reads. Raises AdapterError when they do not fit it."""
    path, kind = directory / TENSORS, settings["peft_type"]
    found = dict(read_file(path))
    tensor = found.pop(TENSOR, None)
    if tensor is None or found:
        raise AdapterError(f"{path} holds {', '.join(found) or 'nothing'}; the one tensor {TENSOR} is expected.")
    check_decoder(model, max(len(tensor), 1) if tensor.dim() else 1)
    expected = prefix_size(model.config) if kind == PREFIX else model.config.hidden_size
    if tensor.dim() != 2 or tensor.shape[1] != expected or tensor.shape[0] == 0:
        raise AdapterError(
            f"{path}: {TENSOR} has shape {tuple(tensor.shape)}; {kind} on this model needs (virtual tokens, "
            f"{expected}). The adapter belongs to another model."
        )
    if settings.get("num_virtual_tokens") not in (None, len(tensor)):
        raise AdapterError(
            f"{directory / CONFIG} says num_virtual_tokens = {settings['num_virtual_tokens']!r}, and {TENSORS} holds "
            f"{len(tensor)}; they do not belong together."
        )
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"{path} holds values that are not finite numbers; the file is damaged.")
    add_virtual(model, Prompt(tensor) if kind == PROMPT else Prefix(model.config, tensor))


def write(model: Model, directory: Path, base: Path | None) -> None:
    """Write the virtual tokens of `model` as an adapter on `base`. Raises OutputError as `check_place`."""
    base = check_place(model, base)
    virtual = virtual_of(model)
    tensor: Tensor
    if isinstance(virtual, Prompt):
        tensor, own = virtual.prompt_MD, _described(model.config, PROMPT)
        own |= {"prompt_tuning_init": "RANDOM"}
    elif isinstance(virtual, Prefix):
        tensor, own = virtual.values_MF(), _described(model.config, PREFIX)
        own |= {"prefix_projection": False, "encoder_hidden_size": own["token_dim"]}
    else:
        raise OutputError("this model has no virtual tokens to write.")
    config = {
        **own,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(base),
        "num_virtual_tokens": virtual.length,
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_file({TENSOR: _plain(tensor)}, directory / TENSORS)


def check_place(model: Model, base: Path | None) -> Path:
    """The base. Raises OutputError when virtual tokens of this model could not be saved, whatever they learn."""
    if base is None:
        raise OutputError("an adapter is saved as an addition to a base model on disk; save the base model first.")
    others = ["attached modules"] if model.attached else []
    if any(linear.deltas for linear in model.linears().values()):
        others.append("deltas (LoRA)")
    if others:
        raise OutputError(
            f"this model carries {' and '.join(others)}, for which PEFT's format has no place beside virtual tokens. "
            f"`bildung merge` a LoRA into its base first; detach modules (bildung.detach)."
        )
    return base


def _described(config: ModelConfig, kind: str) -> dict[str, Any]:
    """What peft builds its module from: of a prefix, the heads and width of the keys and values (grouped or not)."""
    heads, width = config.num_attention_heads, config.hidden_size
    if kind == PREFIX:
        heads, width = config.num_key_value_heads, config.num_key_value_heads * config.head_dim
    return {
        "peft_type": kind,
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": config.num_hidden_layers,
    }


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()

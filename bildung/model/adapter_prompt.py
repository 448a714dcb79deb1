"""PROMPT_TUNING: the vectors of virtual tokens (virtual.py) in PEFT's file, one tensor

    prompt_embeddings (m, hidden)

`peft` opens what is written here, and the other way round, with equal logits: there, too, virtual tokens take the
positions 0 .. m-1 and the tokens go on from m. What a prompt started from is in the record, not in the config, from
which `peft` would look for the tokenizer again.
"""

# M virtual tokens, F numbers of each

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import AdapterError
from bildung.model.safetensors_file import read_file
from bildung.model.virtual import Prompt, add_virtual, check_decoder, virtual_of

WHAT, DELTAS = "a prompt of virtual tokens", ()
TENSOR = "prompt_embeddings"
# Both halves of an encoder-decoder with virtual tokens are not built here.
REQUIRED: dict[str, tuple[Any, ...]] = {"num_transformer_submodules": (1, None)}
INERT = set(
    "num_virtual_tokens token_dim num_attention_heads num_layers prompt_tuning_init prompt_tuning_init_text "
    "tokenizer_name_or_path tokenizer_kwargs".split()
)


def check(given: dict[str, Any], path: Path) -> None:
    """Nothing in the config beyond what the tensor's shape says again."""


def add_to(model: Any, path: Path, settings: dict[str, Any], name: str) -> None:
    """Put the file's vectors before what `model` reads. Raises AdapterError when they do not fit it."""
    add_virtual(model, Prompt(read_tensor(model, path, settings, model.config.hidden_size)))


def holds(model: Any) -> bool:
    """Whether the model reads such a prompt."""
    return isinstance(virtual_of(model), Prompt)


def parts(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the config's keys, the tensors)."""
    prompt_MD = model.model.virtual.prompt_MD
    config = {
        "num_virtual_tokens": len(prompt_MD),
        "num_transformer_submodules": 1,
        "token_dim": model.config.hidden_size,
        "num_attention_heads": model.config.num_attention_heads,
        "num_layers": model.config.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
    }
    return config, {TENSOR: prompt_MD}


def read_tensor(model: Any, path: Path, settings: dict[str, Any], width: int) -> Tensor:
    """The file's one tensor (M, F). Raises AdapterError when it is another than `model` and the config ask for."""
    found = dict(read_file(path))
    tensor = found.pop(TENSOR, None)
    if tensor is None or found:
        raise AdapterError(f"{path} holds {', '.join(found) or 'nothing'}; the one tensor {TENSOR} is expected.")
    if tensor.dim() != 2 or tensor.shape[1] != width or len(tensor) == 0:
        raise AdapterError(
            f"{path}: {TENSOR} has shape {tuple(tensor.shape)}; {settings['peft_type']} on this model needs (virtual "
            f"tokens, {width}). The adapter belongs to another model."
        )
    if settings.get("num_virtual_tokens") not in (None, len(tensor)):
        raise AdapterError(
            f"{path} holds {len(tensor)} virtual tokens, and the config beside it says num_virtual_tokens = "
            f"{settings['num_virtual_tokens']!r}; they do not belong together."
        )
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"{path} holds values that are not finite numbers; the file is damaged.")
    check_decoder(model, len(tensor))
    return tensor

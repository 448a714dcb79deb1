"""What each family's files call the tensors: here every model has the same module names, on disk each has its own.

A family lists the differences in `names(config)`: module path here -> `Stored`, or just the name, in the file; `*`
stands for a layer's number. What is not listed has the same name in both places, as in Llama and its kin.

    "model.layers.*.self_attn.k_proj": Stored("transformer.h.*.attn.c_attn", part=1, parts=3, transposed=True)

Families that keep q, k and v in one matrix are taken apart on reading and put together on writing.
"""

# O output features, I input features

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import ModelFileError
from bildung.model.config import BaseConfig


@dataclass(frozen=True)
class Stored:
    """Where a module's tensors lie in the file.

    part, parts   one of several equal blocks of rows of a fused matrix and its bias
    heads         the fused rows are ordered head by head, each with its q, k and v (GPT-NeoX), not q, k, v as blocks
    transposed    the matrix is stored as [in, out] (GPT-2's Conv1D)
    shape         what follows the rows in the stored shape of a convolution's weight: [C, P, P] of [D, C, P, P]
    """

    name: str
    part: int = 0
    parts: int = 1
    heads: int = 0
    transposed: bool = False
    shape: tuple[int, ...] = ()


Names = Mapping[str, "Stored | str"]


def family_of(config: BaseConfig) -> ModuleType:
    """The module of families/ that reads this model's config."""
    return import_module(f"bildung.model.families.{config.model_type}")


def places(config: Any) -> dict[str, Stored]:
    """Module path (or parameter path) -> place in the file, for what the family calls otherwise."""
    listed = getattr(family_of(config), "names", None)
    names: Names = listed(config) if listed is not None else {}
    depths = [one.num_hidden_layers for one in (config, getattr(config, "encoder", None)) if one is not None]
    found = {}
    for path, stored in names.items():
        stored = Stored(stored) if isinstance(stored, str) else stored
        for layer in range(max(depths) if "*" in path else 1):
            place = stored.name.replace("*", str(layer))
            found[path.replace("*", str(layer))] = Stored(
                place, stored.part, stored.parts, stored.heads, stored.transposed, stored.shape
            )
    return found


def place_of(key: str, table: Mapping[str, Stored]) -> tuple[str, Stored]:
    """(name in the file, how it lies there) of one of our tensors."""
    if key in table:
        return table[key].name, table[key]
    module, _, leaf = key.rpartition(".")
    stored = table.get(module)
    return (f"{stored.name}.{leaf}", stored) if stored is not None else (key, Stored(key))


def quantized_place(linear: str, table: Mapping[str, Stored]) -> str:
    """The name in the file of a matrix in quantized form. A block of numbers can be neither transposed nor put
    together with others, so the parts of a fused matrix then lie side by side, each under its name here."""
    stored = table.get(linear, Stored(linear))
    return f"{stored.name}.{linear.rpartition('.')[2]}" if is_reshaped(stored) else stored.name


def is_reshaped(stored: Stored) -> bool:
    """Whether a matrix of the file is another than ours: several in one, transposed, or of more dimensions."""
    return stored.parts > 1 or stored.transposed or bool(stored.shape)


def architecture(config: BaseConfig) -> str:
    """What `architectures` in config.json says: which of transformers' classes loads the file."""
    name = family_of(config).ARCHITECTURE
    found = str(name(config) if callable(name) else name)
    return classifier_architecture(found) if config.kind == "classifier" else found


def classifier_architecture(decoder: str) -> str:
    """The class of a family with a head (decoder_classifier.py): GPT2LMHeadModel -> GPT2ForSequenceClassification."""
    if decoder == "Gemma3ForCausalLM":
        return "Gemma3TextForSequenceClassification"
    return decoder.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "ForSequenceClassification"


def cut(tensor: Tensor, stored: Stored, is_weight: bool) -> Tensor:
    """Our tensor, out of the file's."""
    if stored.transposed and is_weight:
        tensor = tensor.t()
    if stored.shape and is_weight:
        if tensor.shape[1:] != stored.shape:
            raise ModelFileError(
                f"tensor {stored.name}.weight has shape {tuple(tensor.shape)}; a convolution's, (out, "
                f"{', '.join(map(str, stored.shape))}), is needed."
            )
        tensor = tensor.flatten(1)
    if stored.parts == 1:
        return tensor
    if tensor.shape[0] % (stored.parts * max(stored.heads, 1)):
        raise ModelFileError(
            f"a fused tensor of shape {tuple(tensor.shape)} does not divide into {stored.parts} parts"
            f"{f' of {stored.heads} heads' if stored.heads else ''}; the file and config.json disagree."
        )
    if stored.heads:
        return tensor.unflatten(0, (stored.heads, stored.parts, -1))[:, stored.part].flatten(0, 1)
    return tensor.chunk(stored.parts)[stored.part]


def join(parts: Mapping[int, Tensor], stored: Stored, is_weight: bool) -> Tensor:
    """The file's tensor, out of ours."""
    tensors = [parts[index] for index in range(stored.parts)]
    if stored.heads and stored.parts > 1:
        tensor = torch.stack([one.unflatten(0, (stored.heads, -1)) for one in tensors], dim=1).flatten(0, 2)
    else:
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if stored.shape and is_weight:
        tensor = tensor.reshape(tensor.shape[0], *stored.shape)
    return tensor.t() if stored.transposed and is_weight else tensor


def to_file(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Tensors under our names -> under the family's."""
    table = places(config)
    groups: dict[str, tuple[Stored, dict[int, Tensor]]] = {}
    for key, tensor in tensors.items():
        name, stored = place_of(key, table)
        groups.setdefault(name, (stored, {}))[1][stored.part] = tensor
    return {
        name: join(parts, stored, _is_weight(name, stored)).contiguous() for name, (stored, parts) in groups.items()
    }


def repeated(config: Any) -> tuple[str, ...]:
    """Patterns of tensors that a file may hold and nobody needs: they repeat others or follow from the config."""
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return (*getattr(family_of(config), "REPEATED", tied), "*rotary_emb.inv_freq")


def complete(tensors: dict[str, Tensor], config: Any) -> None:
    """In place: put the family's PREFIX before names that lack it all together, as in files of the model without its
    head (GPT2Model) and in the first ones of GPT-2."""
    prefix = getattr(family_of(config), "PREFIX", "")
    if prefix and not any(name.startswith(prefix) for name in tensors):
        for name in [name for name in tensors if not name.startswith(("lm_head.", "score."))]:
            tensors[prefix + name] = tensors.pop(name)


def from_file(tensors: dict[str, Tensor], config: Any, wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that `wanted` (our names) needs, taken out of the file's; what is missing is left out."""
    table = places(config)
    found, used = {}, set()
    for key in wanted:
        name, stored = place_of(key, table)
        if name in tensors:
            found[key] = cut(tensors[name], stored, _is_weight(name, stored))
            used.add(name)
    for name in used:
        del tensors[name]
    return found


def _is_weight(name: str, stored: Stored) -> bool:
    return not name.endswith(".bias") and name != stored.name

"""Tensors of a file into the places of a model: each must be expected, there, of the right shape, and finite.

What does not fit is listed, all of it: one wrong number in config.json shows in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import ModelFileError, nearest
from bildung.model import names, quantized_file
from bildung.model.build import make
from bildung.model.config import BaseConfig
from bildung.model.quantized_file import DTYPES

LISTED = 6  # of one kind of problem; the others are counted


def assemble(config: BaseConfig, tensors: dict[str, Tensor], dtype: str | None = None) -> Any:
    """A model in evaluation mode holding `tensors` (the file's name -> tensor; the dictionary is emptied).

    Raises ModelFileError for missing, left-over, misshapen or non-finite tensors, naming them.
    """
    present = getattr(names.family_of(config), "present", None)
    if present is not None:  # a head that the files may have or not, and config.json does not say
        config = replace(config, **present(config, tensors))
    with torch.device("meta"):
        model = make(config)
    for name in [name for name in tensors if name.endswith((".gamma", ".beta"))]:  # BERT's first files
        stem, _, leaf = name.rpartition(".")
        tensors[f"{stem}.{'weight' if leaf == 'gamma' else 'bias'}"] = tensors.pop(name)
    names.complete(tensors, config)
    table = names.places(config)
    quantized_file.load_stores(model, tensors, table, dtype)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
    keys = {name: name.replace(".base.weight", ".weight") for name in wanted}
    found = names.from_file(tensors, config, keys.values())
    missing, misshapen = [], []
    for name, parameter in wanted.items():
        key = names.place_of(keys[name], table)[0]
        if keys[name] not in found:
            missing.append(key)
            continue
        tensor = found.pop(keys[name])
        if tensor.shape != parameter.shape:
            shapes = f"has shape {tuple(tensor.shape)}, config.json asks for {tuple(parameter.shape)}"
            misshapen.append(f"{key} {shapes}")
            continue
        # One NaN or infinity makes the sum one too; looking at every value takes many times as long.
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.sum())):
            raise ModelFileError(f"tensor {key} holds values that are not finite numbers; the file is damaged.")
        parent, _, leaf = name.rpartition(".")
        tensor = tensor.to(DTYPES[dtype] if dtype else tensor.dtype).contiguous()
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    left = [key for key in tensors if not any(fnmatch(key, known) for known in names.repeated(config))]
    if missing or misshapen or left:
        raise ModelFileError(_misfit(list(dict.fromkeys(missing)), misshapen, left))
    model.tie()
    return model.eval()


def _misfit(missing: Sequence[str], misshapen: Sequence[str], left: Sequence[str]) -> str:
    """What does not fit, in a sentence for each kind."""
    said = []
    if missing:
        hint = nearest(missing[0], left) if len(missing) == 1 else ""
        said.append(f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing{f'; {hint}' if hint else '.'}")
    if misshapen:
        said.append(f"{_listed(misshapen)}.")
    if left:
        said.append(f"{_listed(left)} belong{'s' if len(left) == 1 else ''} nowhere in this model.")
    return " ".join([*said, "The file is incomplete, or weights and config.json belong to different models."])


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return f"{'tensor' if len(items) == 1 else f'{len(items)} tensors:'} {', '.join(items[:LISTED])}{more}"

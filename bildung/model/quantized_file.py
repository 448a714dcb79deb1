"""Quantized weights in a model directory: which matrices the files hold in which format, read and described.

The formats themselves are in int8.py and nf4.py. Where a family's files fuse q, k and v or transpose matrices, no
format of the field applies: the parts then lie side by side, and only this library reads the directory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bildung.core.errors import ConfigError, OutputError
from bildung.model import names, quantized
from bildung.model.base import Model
from bildung.model.linear import Dense

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_stores(model: Model, tensors: dict[str, Tensor], table: Mapping[str, names.Stored], dtype: str | None) -> None:
    """Give every matrix that the file holds in quantized form its quantized store."""
    method = quantized.method_of(model.config.raw)
    if method is None:
        return
    kind = quantized.METHODS[method]
    stored = dtype or model.config.raw.get("dtype") or model.config.raw.get("torch_dtype") or "bfloat16"
    if not isinstance(stored, str) or stored not in DTYPES:
        raise ConfigError(f"config.json: dtype = {stored!r} is not known; allowed: {', '.join(DTYPES)}.")
    for name, linear in model.linears().items():
        marker = "weight_packed" if method == "int8" else "weight.absmax"
        place = names.quantized_place(name, table)
        if f"{place}.{marker}" not in tensors:
            continue
        prefix = f"{place}.weight"
        parts = {k.removeprefix(f"{place}."): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        shape = (linear.out_features, linear.in_features)
        linear.base = kind.from_tensors(parts, shape, DTYPES[stored])
        if name in table and names.is_reshaped(table[name]):
            tensors.pop(f"{table[name].name}.weight", None)  # the stop sign, see state_tensors


def described(model: Model, dtype: torch.dtype) -> dict[str, object] | None:
    """config.json's quantization_config for the stores the model has (None: all dense).

    Raises OutputError for two formats in one model, and for a fused matrix that is quantized in part.
    """
    kinds = {name: type(linear.base) for name, linear in model.linears().items()}
    methods = {method for method, kind in quantized.METHODS.items() if kind in kinds.values()}
    if not methods:
        return None
    if len(methods) > 1:
        raise OutputError(
            f"one directory holds one quantization format; this model mixes {', '.join(sorted(methods))}."
        )
    kept = [name for name, kind in kinds.items() if kind is Dense]
    if own := only_here(model):
        _check_whole(model, own)
        return quantized.describe_own(methods.pop(), kept)
    table = names.places(model.config)  # others look for these matrices under the names that the family's files have
    return quantized.describe(methods.pop(), [table[n].name if n in table else n for n in kept], dtype)


def only_here(model: Model) -> list[str]:
    """The quantized matrices that no other library will find: those that the family's files fuse or transpose."""
    table = names.places(model.config)
    linears = model.linears().items()
    return [n for n, one in linears if not isinstance(one.base, Dense) and n in table and names.is_reshaped(table[n])]


def _check_whole(model: Model, own: list[str]) -> None:
    table = names.places(model.config)
    fused = {table[name].name for name in own}
    for name, linear in model.linears().items():
        if isinstance(linear.base, Dense) and name in table and table[name].name in fused:
            raise OutputError(
                f"{name} is dense, and other parts of {table[name].name}, with which it is one matrix in this family's "
                f"files, are quantized. Quantize all of its parts, or none."
            )

"""Low-rank factors under the names, and in the shapes, that the family's files give its matrices.

Where the file has one matrix for q, k and v, peft has one adapter; here each of the three has its own delta:

    file:  W = [Wq; Wk; Wv]      one adapter      dW = B A            A (R, I), B (3 O, R)
    here:  three deltas          dWq = Bq Aq ...                      A (r, I), B (O, r)

    apart      Bq, Bk, Bv are the blocks of rows of B; each takes the rows of A that its B uses
    together   A = [Aq; Ak; Av] and B block-diagonal: rank 3 r. Equal A's are written once, so an adapter of peft
               that was read and not trained further is written back at the rank it had
"""

# R rank of the file's adapter, r of ours, I input features, O output features

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import ModelFileError
from bildung.model.linear import linears
from bildung.model.names import Stored, cut, family_of, join, places

Factors = tuple[Tensor, Tensor]  # A, B
PREFIX = "base_model.model."  # of every tensor in peft's files


def targets(model: Any) -> dict[str, dict[str, Stored]]:
    """The file's matrix, as transformers' module path -> {path of a Linear here: which part of it}."""
    table = places(model.config)
    # Where transformers' module is not called what its files call it: the names, or a function of the config.
    modules = getattr(family_of(model.config), "MODULES", {})
    modules = modules(model.config) if callable(modules) else modules
    found: dict[str, dict[str, Stored]] = {}
    for name in linears(model):
        stored = Stored(modules[name]) if name in modules else table.get(name, Stored(name))
        found.setdefault(stored.name, {})[name] = stored
    return found


def is_transposed(model: Any) -> bool:
    """Whether the family's matrices lie as [in, out], which peft calls fan_in_fan_out."""
    return any(stored.transposed for stored in places(model.config).values())


def apart(lora_A: Tensor, lora_B: Tensor, members: Mapping[str, Stored], *, whole: bool = False) -> dict[str, Factors]:
    """The file's factors -> those of each Linear here. whole: all of A for each; else only the rows that its B uses,
    and nothing for a part that B leaves alone.

    Raises ModelFileError when B does not divide into the parts.
    """
    lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)  # a convolution's are (r, C, P, P) and (O, r, 1, 1)
    if not all(stored.parts > 1 for stored in members.values()):
        return dict.fromkeys(members, (lora_A, lora_B))
    untrained = not bool(lora_B.any())  # B starts at zero: nothing can be told from it yet
    found = {}
    for name, stored in members.items():
        rows = cut(lora_B, stored, is_weight=False)
        used = torch.ones(len(lora_A), dtype=torch.bool) if untrained or whole else rows.any(dim=0)
        if bool(used.any()):
            found[name] = (lora_A[used].clone(), rows[:, used].clone())
    return found


def together(factors: Mapping[str, Factors], members: Mapping[str, Stored], sizes: Mapping[str, int]) -> Factors:
    """The factors of the Linears that make up one matrix of the file -> that matrix's. sizes: output features."""
    stored = next(iter(members.values()))
    if stored.parts == 1:
        lora_A, lora_B = factors[next(iter(members))]
        if stored.shape:
            return lora_A.reshape(len(lora_A), *stored.shape), lora_B.reshape(
                *lora_B.shape, *[1 for _ in stored.shape[1:]]
            )
        return lora_A, lora_B
    if len(members) != stored.parts:
        raise ModelFileError(f"{stored.name} has {stored.parts} parts, and {len(members)} are known.")
    different: list[Tensor] = []
    for lora_A, _ in factors.values():
        if not any(torch.equal(lora_A, other) for other in different):
            different.append(lora_A)
    starts = [sum(len(one) for one in different[:index]) for index in range(len(different))]
    rank = sum(len(one) for one in different)
    parts = {}
    for name, place in members.items():
        rows = different[0].new_zeros(sizes[name], rank)
        if name in factors:
            lora_A, lora_B = factors[name]
            start = next(start for start, other in zip(starts, different, strict=True) if torch.equal(other, lora_A))
            rows[:, start : start + len(lora_A)] = lora_B
        parts[place.part] = rows
    return torch.cat(different), join(parts, stored, is_weight=False)


def vectors(tensor: Tensor, members: Mapping[str, Stored]) -> dict[str, Tensor]:
    """A number per output feature of the file's matrix -> those of each Linear here. Raises ModelFileError."""
    return {name: cut(tensor.flatten(), stored, is_weight=False).clone() for name, stored in members.items()}


def vector(parts: Mapping[str, Tensor], members: Mapping[str, Stored]) -> Tensor:
    """The inverse of `vectors`."""
    stored = next(iter(members.values()))
    return join({place.part: parts[name] for name, place in members.items()}, stored, is_weight=False)


def shortest_names(chosen: list[str], all_names: list[str]) -> list[str]:
    """["q_proj", "v_proj"] when exactly the matrices of these kinds were chosen, else the full paths."""
    kinds = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    same = [name for name in all_names if name.rsplit(".", 1)[-1] in kinds]
    return kinds if sorted(same) == sorted(chosen) else chosen

"""torch.compile for the layers of a model, while it trains.

Each layer is a graph, and all layers are the same one: it is compiled once, not thirty times. Lengths are left open,
so batches of other lengths do not compile again. The embedding, the loss in chunks and the optimizer stay as they are.
Taps and attached modules are part of the graph (taps.py).
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from bildung.core.errors import SettingsError
from bildung.model.block import Block

COMPILERS = ("g++", "clang++", "c++")


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the layers in place; names and parameters stay. Raises SettingsError for a model without layers, or
    where no compiler for the generated code is found."""
    layers = [module for module in model.modules() if isinstance(module, Block)]
    if not layers:
        raise SettingsError(
            f"compile is for stacks of Transformer layers; a {type(model).__name__} has none. Leave it off."
        )
    if backend == "inductor":
        check_compiler(next(model.parameters()).device)
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)


def leave_compiled(model: nn.Module) -> None:
    """Layers as they are written again."""
    for module in model.modules():
        if isinstance(module, Block):
            module._compiled_call_impl = None


def check_compiler(device: torch.device) -> None:
    """Raises SettingsError when the code that torch.compile writes cannot be compiled here."""
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise SettingsError("compile on a GPU needs the package triton; install it, or leave compile off.")
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((named,) if named else COMPILERS)):
        raise SettingsError(
            f"compile needs a C++ compiler, and none of {named or ', '.join(COMPILERS)} is found; install g++ (Debian: "
            f"apt-get install g++), set CXX to one, or leave compile off."
        )

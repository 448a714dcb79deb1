"""Before a run: what it will hold in memory and how long it will take, part by part.

    weights       read once; float32 where they train
    gradients     one number per trained one
    optimizer     AdamW: two numbers per trained one
    activations   what the backward pass will need of one micro-batch
    logits        of one chunk of rows, with their slope (train/objectives.py)

Activations are not estimated by a formula but counted: the model runs once on fake tensors, which have shapes and no
numbers, and what autograd keeps is added up. So every family, adapter, dropout and attention kernel counts as it is.

With N ranks the parts shrink as the textbook says (Rajbhandari et al. 2020): zero1 divides the optimizer, zero2 the
gradients too, zero3 the weights too. (Weights here are float32 masters; see parallel.py.)
"""

# B rows, L length

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bildung.model.base import CausalLM
from bildung.model.count import count, totals
from bildung.train.objectives import CHUNK_ELEMENTS, surprisal_sum

OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw": 0.0, "adamw_8bit": 2.1, "muon": 4.0, "adafactor": 0.1}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of each part on one device, and the arithmetic of one token."""

    parameters: int
    trainable: int
    flops_per_token: int  # of training: three forward passes
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int  # the process itself: Python, PyTorch, its threads
    micro_steps: int = 1

    @property
    def peak_bytes(self) -> int:
        """The most that is there at a time, on one device."""
        return self.on(1, "ddp")

    def on(self, ranks: int, kind: str) -> int:
        """Peak bytes of one of several ranks.

        In the backward pass activations go as gradients come, so the larger of the two counts; from the second
        micro-step on, the gradients of those before are there from the start.
        """
        by = {
            "ddp": (1, 1, 1),
            "zero1": (1, 1, ranks),
            "zero2": (1, ranks, ranks),
            "zero3": (ranks, ranks, ranks),
        }[kind]
        gradients = self.gradients // by[1]
        both = self.activations + gradients if self.micro_steps > 1 else max(self.activations, gradients)
        return self.weights // by[0] + self.optimizer // by[2] + both + self.logits + self.runtime


def plan(
    model: Any,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: str = "adamw",
    micro_steps: int = 1,
) -> Plan:
    """What one training step on `rows` rows of `length` tokens holds; the model as it will be trained.

    `model` says by requires_grad what trains, and may be on paper (model.count.on_paper) or real.
    """
    parts = count(model, length)
    parameters, multiply_adds = totals(parts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stored = {id(tensor): tensor for tensor in _all_tensors(model)}.values()
    trained_bytes = sum(parameter.numel() * 4 for parameter in trained)
    vocab = model.config.vocab_size
    chunk = min(CHUNK_ELEMENTS, rows * length * vocab) * (4 + dtype.itemsize + 4)
    return Plan(
        parameters=parameters,
        trainable=sum(parameter.numel() for parameter in trained),
        flops_per_token=2 * 3 * multiply_adds // length,
        weights=sum(tensor.nbytes for tensor in stored),
        gradients=trained_bytes,
        optimizer=int(OPTIMIZER_BYTES[optimizer] * trained_bytes / 4),
        activations=saved_bytes(model, rows, length, dtype),
        logits=chunk,
        runtime=psutil.Process().memory_info().rss,
        micro_steps=micro_steps,
    )


def _all_tensors(model: Any) -> Iterable[Tensor]:
    """Parameters and the numbers of quantized stores."""
    yield from model.parameters()
    for linear in model.linears().values():
        yield from linear.base.tensors().values()


def saved_bytes(model: Any, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, parameters themselves apart."""
    before = model.compute_dtype
    kept: dict[int, tuple[int, Tensor]] = {}
    own: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that its number is not given anew
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _fake_copy(model)
        own.update(parameter.untyped_storage()._cdata for parameter in fake.parameters())
        fake.compute_dtype = dtype
        fake.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            read(fake, rows, length)
    model.compute_dtype = before
    return sum(size for size, _ in kept.values())


def read(model: Any, rows: int, length: int) -> tuple[Any, Tensor, Tensor]:
    """(the model that reads, what it reads, final states): random tokens, as source and target of a model that answers
    sources, or random images."""
    if model.config.kind == "vision":
        image = model.config.image
        pixels_BCHW = torch.randn(rows, image.num_channels, *image.image_size)
        return model, pixels_BCHW, model.hidden(pixels_BCHW)
    tokens_BL = torch.randint(0, model.config.vocab_size, (rows, length))
    if model.config.kind in ("encoder-decoder", "seq2seq"):
        model = model.given(tokens_BL)
    return model, tokens_BL, model.hidden(tokens_BL)


def _fake_copy(model: Any) -> Any:
    """The same model without numbers: same shapes, deltas and requires_grad."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        fake = torch.nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
        )
        memo[id(parameter)] = fake
    for module in model.modules():  # small tables that follow from the config, and quantized numbers, stay as they are
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
        memo |= {id(buffer): buffer for buffer in module.buffers(recurse=False)}
    return copy.deepcopy(model, memo)


def speed(model: Any, *, rows: int, length: int, seconds: float, dtype: torch.dtype = torch.bfloat16) -> float:
    """Tokens per second of forward and backward passes on random numbers, after one that warms up. (Of an encoder or a
    model of images without its head, a small part of the work.)"""
    real = copy.deepcopy(model).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.normal_(0.0, 0.02)
    real.compute_dtype = dtype
    real.train()
    passes, start = 0, time.monotonic()
    while passes < 2 or time.monotonic() - start < seconds:
        reader, tokens_BL, h_BLD = read(real, rows, length)
        if isinstance(reader, CausalLM):
            surprisal_sum(reader, h_BLD[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten()).backward()
        else:
            h_BLD.float().square().sum().backward()
        passes += 1
        if passes == 1:
            start = time.monotonic()
    return (passes - 1) * rows * length / (time.monotonic() - start)

"""Before a run: what a training step will hold in memory, part by part, and how much it computes.

    weights       as they are kept: float32 where they train
    cast          copies of them in the type of the activations, which the backward pass needs again
    gradients     one number per trained one; until the backward pass reaches a weight it has none
    optimizer     AdamW: two numbers per trained one, from the second step on
    activations   what the backward pass will need of one micro-batch
    logits        of one chunk of rows, with their slope (train/objectives.py)
    checkpoint    the copy of what trains, and of the optimizer's state, that a thread writes while training goes on
    kept          what trains, as it was when it last held a budget for forgetting (tune/forgetting.py)
    holes         on a CPU, memory that the C library keeps between tensors that come and go
    runtime       the process itself: Python, PyTorch, their threads, the data

The step is run once on paper (ledger.py), so all of this is counted but three parts: the optimizer's state, which is
known; the runtime, which is what the process has when it is asked; and the holes, which no count of tensors shows. The
parts do not all have their largest size at the same time: those printed are of the fullest moment.

With N ranks the parts shrink as the textbook says (sharing.py): zero1 divides the optimizer, zero2 the gradients too,
zero3 the weights too. Tensor parallelism divides all of these but what goes with the stream, and the casts; that it
divides most activations as well is not counted.
"""

# B rows, L length

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import psutil
import torch
from torch import Tensor

from bildung.core.hardware import Tidy
from bildung.model.base import CausalLM
from bildung.model.count import count, totals
from bildung.model.recompute import Recompute, set_recompute
from bildung.train import tensor_parallel
from bildung.train.ledger import Ledger, paper_of, without_numbers
from bildung.train.loss import LossSum, Objective
from bildung.train.muon import matrices_of
from bildung.train.objectives import surprisal_sum
from bildung.train.sharing import parts as cut
from bildung.train.utilisation import flops_per_token

Moments = tuple[Mapping[str, int], ...]  # of a step: cast, gradients, activations, logits that are there together
PARTS = ("weights", "cast", "gradients", "optimizer", "activations", "logits", "checkpoint", "kept", "holes", "runtime")
SPARE = {"adamw": 0, "paged_adamw": 2, "muon": 4, "adafactor": 4, "adamw_8bit": 8}
"""Float32 copies of the largest parameter that the optimizer's arithmetic takes for a moment."""
HOLES = 0.3
"""Of what comes and goes in a step, on a CPU. glibc before 2.38 cannot put an aligned block into the hole that one of
the same size has left, so holes add up; with every tensor mapped apart (MALLOC_MMAP_THRESHOLD_=131072) there are none
and a step takes twice as long. Measured on SmolLM2 (docs/log.md): 0.30 and 0.34, and 0.00 with tensors mapped apart."""
DRIFTS_AFTER = 10
"""Micro-batches, about, until holes have grown. Where all have one shape they grow by what fit lets them grow before it
gives memory back (hardware.Tidy); a batch of another shape fits into none of them, and they are twice as large. In a
small step they grow by less, as much again at most. Measured: docs/log.md."""
KERNELS = 70_000_000
"""Bytes of code and work space that the CPU's kernels take once they have run."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device, and the arithmetic of one token."""

    parameters: int
    trainable: int
    flops_per_token: int  # of training: three forward passes, less what frozen matrices save
    weights: int
    gradients: int  # when all are there
    optimizer: int
    moments: Moments
    checkpoint: int = 0
    kept: int = 0
    runtime: int = 0
    steps: int = 2  # with one step, the optimizer's state comes after the activations are gone
    passes: int = 2  # micro-batches of all steps together
    holes: float = 0.0  # a share of the moment
    varied: bool = False  # batches differ in shape
    divisible: int = 1  # numbers of ranks that divide this can share the matrices (tensor parallelism)
    whole_weights: int = 0  # bytes of which they would share nothing
    whole_gradients: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most that is there at a time, on one device."""
        return self.on(1, "ddp")

    @property
    def parts(self) -> dict[str, int]:
        """The parts at that moment."""
        return self.parts_on(1, "ddp")

    def on(self, ranks: int, kind: str) -> int:
        """Peak bytes of one of several ranks."""
        return sum(self.parts_on(ranks, kind).values())

    def parts_on(self, ranks: int, kind: str) -> dict[str, int]:
        """The parts of one of several ranks at its fullest moment."""
        weights, gradients, optimizer = self._shares(kind, ranks)
        fixed = {
            "weights": int(self.weights * weights),
            "optimizer": int(self.optimizer * optimizer) if self.steps > 1 else 0,
            "checkpoint": int(self.checkpoint * min(weights, optimizer)),
            "kept": self.kept,
            "runtime": self.runtime,
        }
        found = [{**moment, "gradients": int(moment.get("gradients", 0) * gradients)} for moment in self.moments]
        if kind == "tensor":
            found = [{**moment, "cast": moment.get("cast", 0) // ranks} for moment in found]
        fullest = max(found, key=lambda moment: sum(moment.values()))
        holes = int(self.holes * sum(fullest.values()))
        if self.passes >= DRIFTS_AFTER:
            holes += holes if self.varied else min(holes, Tidy.SLACK)
        whole = {**fixed, **fullest, "holes": holes}
        update = {**fixed, "gradients": int(self.gradients * gradients), "optimizer": int(self.optimizer * optimizer)}
        best = max(whole, update, key=lambda parts: sum(parts.values()))
        return {name: best.get(name, 0) for name in PARTS}

    def _shares(self, kind: str, ranks: int) -> tuple[Fraction, Fraction, Fraction]:
        """Of weights, gradients and optimizer state, what a rank holds."""
        weights, gradients, optimizer = (Fraction(1, count) for count in cut(kind, ranks))
        if kind == "tensor":
            weights += (1 - weights) * Fraction(self.whole_weights, max(1, self.weights))
            gradients += (1 - gradients) * Fraction(self.whole_gradients, max(1, self.gradients))
            optimizer = gradients
        return weights, gradients, optimizer


def plan(
    model: Any,
    objective: Objective,
    batch: Any,
    *,
    optimizer: str = "adamw",
    kept_as: str = "fp32",
    page_budget: float = 256e6,
    micro_steps: int = 1,
    steps: int = 2,
    checkpoint: bool = False,
    recompute: Recompute = "none",
    length: int | None = None,
    runtime: int | None = None,
    on_accelerator: bool = False,
    varied: bool = False,
    moments: Moments | None = None,
) -> Plan:
    """What a training step on such a batch holds.

    model: as it will be trained, its compute_dtype set; requires_grad says what trains. May be on the meta device.
    batch: real numbers, few beside the model's: tokens and masks.
    length: tokens of a row, for the arithmetic; default: that of the batch.
    checkpoint: whether a thread writes copies while training goes on.
    runtime: bytes of the process without the model; default: what this process has now.
    on_accelerator: of a model on the meta device: it is to be trained on one, where neither runtime nor holes count.
    varied: batches differ in shape; this is the largest of them.
    moments: those of `run_on_paper` with this batch, if they are known.
    """
    length = length or length_of(batch)
    parameters, _ = totals(count(model, length))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    state = state_bytes(model, optimizer, kept_as, page_budget)
    if moments is None:
        moments = run_on_paper(model, objective, batch, twice=micro_steps > 1, recompute=recompute)
    on_cpu = model.device.type in ("cpu", "meta") and not on_accelerator
    spare = SPARE[optimizer] * 4 * max((parameter.numel() for parameter in trained), default=0)
    divisible = tensor_parallel.divisible(model)
    common = tensor_parallel.common(model) if divisible > 1 else []
    return Plan(
        parameters=parameters,
        trainable=sum(parameter.numel() for parameter in trained),
        flops_per_token=round(flops_per_token(model, length)),
        weights=sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in _all_tensors(model)}.values()),
        gradients=gradients,
        optimizer=state,
        moments=(*moments, {"gradients": gradients, "activations": spare}),
        checkpoint=gradients + state if checkpoint else 0,
        runtime=(psutil.Process().memory_info().rss + KERNELS if runtime is None else runtime) if on_cpu else 0,
        steps=steps,
        passes=steps * micro_steps,
        holes=HOLES if on_cpu else 0.0,
        varied=varied,
        divisible=divisible,
        whole_weights=sum(tensor.nbytes for tensor in common),
        whole_gradients=sum(tensor.nbytes for tensor in common if tensor.requires_grad),
    )


def run_on_paper(
    model: Any, objective: Objective, batch: Any, *, twice: bool = False, recompute: Recompute = "none"
) -> Moments:
    """The fullest moments of a forward and backward pass, one for each amount of gradients that matters. twice: with
    the gradients of a micro-batch before it."""
    paper = without_numbers(model)
    paper.train()
    set_recompute(paper, recompute)
    vocab_size = getattr(model.config, "vocab_size", None)
    shapes = {(parameter.shape, parameter.dtype) for parameter in paper.parameters() if parameter.requires_grad}
    weights = {shape for shape, _ in shapes} | {parameter.shape for parameter in paper.parameters()}

    def kind_of(tensor: Tensor) -> str:
        if (tensor.shape, tensor.dtype) in shapes:
            return "gradients"
        if tensor.shape in weights and tensor.ndim > 1:
            return "cast"
        return "logits" if vocab_size in tensor.shape[-1:] and tensor.is_floating_point() else "activations"

    ledger = Ledger(kind_of, paper_of(paper))

    def became_gradient(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.note(parameter.grad, "gradients")

    for tensor in _all_tensors(paper):
        ledger.note(tensor, "weights")
    ledger.alive.clear()  # they are counted apart, as they are
    for parameter in paper.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(became_gradient)
    with torch.random.fork_rng(devices=[]), ledger:
        for _ in range(1 + twice):
            ledger.moments.clear()
            loss = objective(paper, batch)
            loss.total.backward()
            del loss
    return _fullest(ledger.moments)


def _fullest(moments: Mapping[int, Counter[str]]) -> Moments:
    """Those that can be the fullest when gradients are cut in parts: with fewer gradients, more of the rest."""
    found: list[Counter[str]] = []
    for gradients in sorted(moments, reverse=True):
        moment = moments[gradients]
        if not found or moment.total() - gradients > max(one.total() - one["gradients"] for one in found):
            found.append(moment)
    return tuple(dict(one) for one in found)


def state_bytes(model: Any, optimizer: str, kept_as: str = "fp32", page_budget: float = 256e6) -> int:
    """Bytes of the optimizer's state (optimizer.py's table), where the weights are."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)
    if kept_as != "fp32":
        return numbers * (10 if kept_as == "kahan" else 8)
    if optimizer == "muon":
        return 8 * numbers - 4 * sum(parameter.numel() for parameter in matrices_of(model))
    if optimizer == "adafactor":
        return sum(4 * (sum(p.shape[-2:]) if p.ndim > 1 else p.numel()) for p in trained)
    if optimizer == "adamw_8bit":
        return sum(p.numel() * 8 if p.numel() < 4096 else p.numel() * 2 + p.numel() // 32 for p in trained)
    return min(8 * numbers, int(page_budget)) if optimizer == "paged_adamw" else 8 * numbers


def _all_tensors(model: Any) -> Iterable[Tensor]:
    """Parameters and the numbers of quantized stores."""
    yield from model.parameters()
    for linear in model.linears().values():
        yield from linear.base.buffers()


def length_of(batch: Any) -> int:
    """Tokens of a row of a batch (of images: 1; their number of patches follows from the model)."""
    for owner in (batch, getattr(batch, "target", None), getattr(batch, "batch", None)):
        if (tokens_BL := getattr(owner, "tokens_BL", None)) is not None:
            return int(tokens_BL.shape[1])
    return 1


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


def any_objective(model: Any, batch: tuple[int, int]) -> LossSum:
    """An objective for (rows, length) when no data is at hand: every token is a target; of a model that continues no
    text, every state counts."""
    rows, length = batch
    reader, tokens_BL, h_BLD = read(model, rows, length)
    if isinstance(reader, CausalLM):
        targets_N = tokens_BL[:, 1:].flatten()
        return LossSum(surprisal_sum(reader, h_BLD[:, :-1].flatten(0, 1), targets_N), targets_N.numel())
    return LossSum(h_BLD.float().square().sum(), h_BLD.shape[0])

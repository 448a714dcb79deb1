"""One training step on several processes: what each holds, and what they tell each other.

    torchrun --nproc_per_node 8 -m bildung pretrain causal ... --parallel zero3

With P parameters, N ranks, bfloat16 compute and float32 Adam, a rank holds (Rajbhandari et al. 2020, arXiv 1910.02054):

    ddp     everything: weights 2P, gradients 2P, masters and moments 12P               16P           bytes
    zero1   optimizer state shared out                                                   4P + 12P/N
    zero2   gradients too (a layer's gradient is reduced and cut as soon as it is there)  2P + 14P/N
    zero3   weights too (a layer's are gathered when they are needed, then dropped)       16P/N

and sends about 2P numbers a step (ddp, zero1, zero2), or 3P (zero3). Here weights are float32 masters and activations
bfloat16, so weights and gradients count 4 bytes each: 16P as well.

The engine is PyTorch's: DistributedDataParallel, ZeroRedundancyOptimizer and fully_shard (FSDP2). All of them want one
module whose forward is the step's loss, because our models are called at `hidden` and `unembed`: `_Step`.

An objective returns sums, so ranks add up: micro-batch n belongs to rank n % N, gradients and counts are summed, and
the one division happens in fit. The number of ranks therefore changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.tensor
from torch import Tensor, nn

from bildung.core import ranks
from bildung.core.errors import SettingsError
from bildung.train.loss import LossSum, Objective

Kind = Literal["none", "ddp", "zero1", "zero2", "zero3", "hybrid"]


class _Step(nn.Module):
    """The loss of a batch as a module's forward: where DDP and FSDP hang their work."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any) -> Any:
        loss = self.objective(self.model, batch)
        # (DDP and FSDP look for tensors in tuples and dictionaries, not in a LossSum.)
        return loss.total, loss.count, dict(loss.metrics)


class Parallel:
    """How the ranks share the work of `fit`. Made before the optimizer: sharding replaces the parameters.

    hybrid: zero3 within a machine, copies across machines (needs several machines).
    offload: optimizer state, gradients and weights stay in host memory between uses (zero2, zero3, hybrid).
    """

    def __init__(self, kind: Kind, model: nn.Module, objective: Objective, *, offload: bool = False) -> None:
        self.kind, self.model, self.rank, self.world = kind, model, ranks.rank(), ranks.world_size()
        _check(kind, self.world, offload)
        self.step: Any = _Step(model, objective)
        self._sharded: list[nn.Module] = []
        if kind != "none":
            ranks.join()
        if kind in ("zero2", "zero3", "hybrid"):
            self._shard(offload)
        elif kind in ("ddp", "zero1"):
            self.step = nn.parallel.DistributedDataParallel(self.step)

    def _shard(self, offload: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        device = next(self.model.parameters()).device.type
        machines = self.world // ranks.local_world_size()
        shape = (machines, self.world // machines) if self.kind == "hybrid" else (self.world,)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        stacks = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        blocks = [block for stack in stacks for block in stack if any(True for _ in block.parameters())]
        keep = self.kind != "zero2"
        for module in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=keep, offload_policy=policy)
        fully_shard(self.step, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
        self._sharded = [*blocks, self.step]

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters are spread over the ranks, so that only `loss` may call the model."""
        return bool(self._sharded)

    @property
    def exchanges(self) -> str:
        """The collectives inside a forward and backward pass, for messages."""
        if self._sharded:
            return "all_gather of weights, reduce_scatter of gradients"
        return "alone" if self.kind == "none" else "all_reduce of gradients"

    def optimizer(self, make: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """The optimizer that `make` makes, its state shared out among the ranks if the kind is zero1."""
        made = make()
        if self.kind != "zero1":
            return made
        from torch.distributed.optim import ZeroRedundancyOptimizer

        accepted = inspect.signature(type(made)).parameters
        defaults = {name: value for name, value in made.defaults.items() if name in accepted}
        groups = [{k: v for k, v in group.items() if k != "initial_lr"} for group in made.param_groups]
        shared: torch.optim.Optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=type(made), **defaults)
        return shared

    def mine(self, micro_steps: int) -> range:
        """Which of a step's micro-batches are this rank's. Raises SettingsError when they do not divide."""
        if micro_steps % self.world:
            raise SettingsError(
                f"micro_steps = {micro_steps} do not divide among {self.world} ranks; every rank does equally many. "
                f"Set micro_steps to a multiple of {self.world}."
            )
        return range(self.rank, micro_steps, self.world)

    @contextlib.contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward pass. last: the gradients are exchanged in it, once per step."""
        if self._sharded:
            self.step.set_requires_gradient_sync(last)
            self.step.set_is_last_backward(last)
        with self.step.no_sync() if self.kind in ("ddp", "zero1") and not last else contextlib.nullcontext():
            yield

    def loss(self, batch: Any) -> LossSum:
        """The objective's value for a batch. (In evaluation too: a sharded model can be called in no other way.)"""
        return LossSum(*self.step(batch))

    def summed(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The sums over all ranks of numbers that each has."""
        if self.kind == "none":
            return dict(numbers)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        device = next(self.model.parameters()).device
        values = values.to(device) if device.type == "cuda" else values
        dist.all_reduce(values)
        return dict(zip(numbers, values.tolist(), strict=True))

    @property
    def gradient_scale(self) -> int:
        """DDP and FSDP average gradients over the ranks; times this they are sums again."""
        return 1 if self.kind == "none" else self.world

    def finish(self) -> None:
        """Leave an ordinary model on every rank: whole parameters, no hooks."""
        for module in self._sharded:
            state = module._get_fsdp_state()  # type: ignore[operator]
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
            module.__class__ = type(module).__mro__[2]  # FSDPBlock(FSDPModule, Block) -> Block
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if is_shard(parameter):
                    whole_tensor = nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad)
                    setattr(module, name, whole_tensor)
        if self._sharded:
            self.model.tie()  # type: ignore[operator]  # one Parameter had become two
        self._sharded = []


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is spread over the ranks."""
    return isinstance(tensor, torch.distributed.tensor.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A spread tensor, gathered on every rank; others as they are. Every rank must call this."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, if `like` is spread."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes this rank holds: weights, gradients, optimizer state."""

    def size(tensor: Any) -> int:
        return int(tensor.to_local().nbytes if is_shard(tensor) else tensor.nbytes)

    inner = getattr(optimizer, "optim", optimizer)  # what ZeroRedundancyOptimizer keeps of it
    states = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    parameters = list(model.parameters())
    return {
        "weights": sum(map(size, parameters)),
        "gradients": sum(size(p.grad) for p in parameters if p.grad is not None),
        "optimizer": sum(map(size, states)),
    }


def _check(kind: Kind, world: int, offload: bool) -> None:
    if kind == "none" and world > 1:
        raise SettingsError(
            f"{world} processes were started, and parallel = 'none': they would all do the same. Choose ddp, zero1, "
            f"zero2, zero3 or hybrid, or start one process."
        )
    if kind != "none" and world < 2:
        raise SettingsError(
            f"parallel = {kind!r} needs several processes: torchrun --nproc_per_node N -m bildung ... "
            f"(this is a single one)."
        )
    if offload and kind not in ("zero2", "zero3", "hybrid"):
        raise SettingsError(f"offload needs parallel = zero2, zero3 or hybrid; it is {kind!r}.")

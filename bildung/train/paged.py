"""AdamW whose state does not fit: pages of it come and go under a byte budget, by explicit copies.

    store    all of m and v: a memory-mapped file (CPU: this is offload to disk), pinned host memory (GPU)
    pages    what is resident beside the weights: slices of (m, v), at most `budget` bytes, least recently used out

    step:    bring page 1 │ bring page 2  │ bring page 3  │          a thread (on a GPU: its own stream) copies
                          │ update page 1 │ update page 2 │ ...      one page ahead of the arithmetic

AdamW looks at each number alone, so the pages' order and size change no bit of the result; every page goes through
PyTorch's own fused kernel. Steps run through the pages forward and backward in turn: always forward, least recently
used would put out each page just before it is needed again; to and fro, budget/total of them are still there.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314) pages through CUDA's unified memory, where the driver decides what moves,
a fault at a time. Here nothing moves by itself, the budget is kept, and it works without a GPU.
"""

# A page: both moments of numbers [start, stop) of a flattened parameter, 8 bytes each

from __future__ import annotations

import mmap
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

from bildung.core.errors import SettingsError
from bildung.train.optimizer import Optimizer

ALIGNED = 1024  # numbers: pages begin where a disk page and a vector register do
LARGEST_PAGE = 2**19  # numbers; 4 MiB of state


@dataclass(frozen=True)
class Page:
    """Which numbers of which parameter."""

    parameter: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return 8 * (self.stop - self.start)


class FileStore:
    """Float32 numbers in a memory-mapped file that vanishes with the process. Reading and writing are copies; what they
    made resident of the mapping is given back at once, so the kernel's cache may drop it under pressure."""

    def __init__(self, numbers: int, folder: Path | None) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(max(4 * numbers, 1))
            self._map = mmap.mmap(file.fileno(), 0)
        self.numbers = torch.frombuffer(self._map, dtype=torch.float32, count=numbers)

    def release(self, start: int, stop: int) -> None:
        """Numbers [start, stop) need not stay in memory. start: a multiple of 1024."""
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, 4 * start, 4 * (stop - start))


class HostStore:
    """Float32 numbers in pinned host memory, from which a GPU copies while it computes."""

    def __init__(self, numbers: int) -> None:
        self.numbers = torch.zeros(numbers, pin_memory=True)

    def release(self, start: int, stop: int) -> None:
        """Host memory is where they live."""


class PagedAdamW(Optimizer):
    """AdamW, bit-equal to torch.optim.AdamW(fused=True), with at most `budget` bytes of its state resident.

    folder: where the file lies (a folder in memory, such as a tmpfs, saves nothing); default: the system's temporary
    one. State: 8 bytes per parameter in the store. `resident_bytes` and `peak_resident_bytes` say what is beside the
    weights. Raises SettingsError for a budget under four pages of 1024 numbers, and for weights that are not float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        budget: int,
        folder: Path | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        page = min(LARGEST_PAGE, budget // 8 // 4 // ALIGNED * ALIGNED)
        if page < ALIGNED:
            raise SettingsError(f"a budget of {budget} bytes was given; at least {4 * 8 * ALIGNED} are needed.")
        self.budget, self._device = budget, self._parameters[0].device
        self._starts, total = [], 0  # where m of each parameter begins in the store; v follows it
        self._pages: list[Page] = []
        for number, parameter in enumerate(self._parameters):
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise SettingsError(f"paged AdamW is for contiguous float32 weights; one is {parameter.dtype}.")
            count = parameter.numel()
            self._starts.append(total)
            total += 2 * _aligned(count)
            self._pages += [Page(number, start, min(start + page, count)) for start in range(0, count, page)]
        self._store = HostStore(total) if self._device.type == "cuda" else FileStore(total, folder)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._resident: OrderedDict[Page, tuple[Tensor, Tensor]] = OrderedDict()  # the least recently used first
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pages")
        self.resident_bytes = self.peak_resident_bytes = self.brought = 0
        for number, parameter in enumerate(self._parameters):
            whole = Page(number, 0, parameter.numel())
            m, v = (part.view_as(parameter) for part in self._stored(whole))
            self.state[parameter] = {"step": torch.zeros(()), "exp_avg": m, "exp_avg_sq": v}

    @property
    def where(self) -> str:
        """For people: where the state is."""
        return "host memory" if self._stream else "disk (no GPU here: this is offload to a memory-mapped file)"

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step over all pages, each brought while the one before is computed with."""
        assert closure is None, "paged AdamW takes gradients that are there"
        groups = [group for group in self.param_groups for _ in group["params"]]
        parameters = self._parameters
        todo = [page for page in self._pages if parameters[page.parameter].grad is not None]
        steps = {page.parameter: self.state[parameters[page.parameter]]["step"] for page in todo}
        if int(max(steps.values(), default=torch.zeros(())).item()) % 2:
            todo.reverse()
        coming = self._bring_soon(todo[0], None) if todo else None
        for page, following in zip(todo, [*todo[1:], None], strict=True):
            assert coming is not None
            m, v = coming.result()
            coming = self._bring_soon(following, page) if following else None
            _update(parameters[page.parameter], page, m, v, steps[page.parameter], groups[page.parameter])
        for step in steps.values():
            step += 1

    def _bring_soon(self, page: Page, keep: Page | None) -> Future[tuple[Tensor, Tensor]]:
        computed = torch.cuda.Event() if self._stream else None
        if computed is not None:
            computed.record()
        return self._worker.submit(self._bring, page, keep, computed)

    def _bring(self, page: Page, keep: Page | None, computed: torch.cuda.Event | None) -> tuple[Tensor, Tensor]:
        """A page's moments where the weights are, others put out for it (never `keep`, which is being computed with).
        Only the worker, one page after the other, changes what is resident."""
        if computed is not None:
            computed.synchronize()  # what is put out has been computed
        if page in self._resident:
            self._resident.move_to_end(page)
            return self._resident[page]
        with torch.no_grad(), torch.cuda.stream(self._stream):  # (a stream of None changes nothing)
            while self.resident_bytes + page.nbytes > self.budget:
                self._put_out(next(other for other in self._resident if other != keep))
            m, v = self._stored(page)
            found = (m.to(self._device, copy=True), v.to(self._device, copy=True))
        self._release(page)
        self._resident[page] = found
        self.brought += 1
        self.resident_bytes += page.nbytes
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)
        return found

    def _put_out(self, page: Page) -> None:
        for stored, moment in zip(self._stored(page), self._resident.pop(page), strict=True):
            stored.copy_(moment)
        self._release(page)
        self.resident_bytes -= page.nbytes

    def _stored(self, page: Page) -> tuple[Tensor, Tensor]:
        """m and v of a page in the store."""
        start = self._starts[page.parameter]
        between = _aligned(self._parameters[page.parameter].numel())
        numbers = self._store.numbers
        m = numbers[start + page.start : start + page.stop]
        return m, numbers[start + between + page.start : start + between + page.stop]

    def _release(self, page: Page) -> None:
        for moment in self._stored(page):
            start = int(moment.storage_offset())
            self._store.release(start, start + moment.numel())

    def flush(self) -> None:
        """Put all pages out: the store, and with it `state`, is then complete."""
        with torch.no_grad():
            for page in list(self._resident):
                self._put_out(page)

    def state_dict(self) -> dict[str, Any]:
        """As of any AdamW; the moments are views of the store, read when they are used."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the moments into the store."""
        self.flush()
        torch.optim.Optimizer.load_state_dict(self, {**state_dict, "state": {}})
        for number, (saved, parameter) in enumerate(zip(self._saved(state_dict), self._parameters, strict=True)):
            m, v = (part.view_as(parameter) for part in self._stored(Page(number, 0, parameter.numel())))
            m.copy_(saved["exp_avg"])
            v.copy_(saved["exp_avg_sq"])
            step = torch.as_tensor(saved["step"], dtype=torch.float32).clone()
            self.state[parameter] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
            self._release(Page(number, 0, parameter.numel()))

    @staticmethod
    def _saved(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        return [state_dict["state"][number] for number in sorted(state_dict["state"])]


def _update(parameter: nn.Parameter, page: Page, m: Tensor, v: Tensor, step: Tensor, group: dict[str, Any]) -> None:
    """One page through the fused kernel that torch.optim.AdamW uses."""
    assert parameter.grad is not None
    beta1, beta2 = group["betas"]
    fused_adamw(
        [parameter.detach().view(-1)[page.start : page.stop]],
        [parameter.grad.contiguous().view(-1)[page.start : page.stop]],
        [m],
        [v],
        [],
        [step.to(parameter.device, copy=True)],  # the kernel counts on in it
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED

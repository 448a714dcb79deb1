"""Progressive networks: every task gets a column of its own, and earlier columns are frozen (Rusu et al. 2016, arXiv
1606.04671). Nothing learned can be lost; the price is parameters per task, and that the task must be known.

    h_i^k = f( W_i^k h_{i-1}^k  +  U_i^k σ( V_i^k [α_j h_{i-1}^j : j < k] ) )       eq. 2, the adapter form

The form for Transformers is OURS; the paper has multilayer perceptrons and convolutions:

    task 1          the model itself is the first column: it trains, and is frozen from then on
    task k > 1      a column of narrow vectors s beside the blocks, one vector per token
                        s_0 = 0
                        s_i = s_{i-1} + gelu( W_i s_{i-1} + U_i gelu( V_i [α_1 n(h_i), α_2 n(s_i²), ...] ) )
                    h_i: the stream after block i of the first column, s_i^j: the side columns between; α: one learned
                    number per column and block; n: normalised to mean 0 and variance 1, because streams grow with depth
                    (the paper leaves that to α, small and random at first; here it starts at 1)
    output          h + P s_last, h what the head reads: of an encoder the pooled vector (site `pooled`; P s_last of the
                    first token), of a decoder the last states (`norm`). P starts at 0, so a task starts at the model

A column reads what the others have behind the same block, the paper's what they had before it. It has no attention:
tokens exchange what the first column's attention exchanges, and no more. That keeps it small and works with every cache
and mask. Gradients stay in the column, so a task trains fast.

With the column of a later task switched off, task 1's logits are bit for bit what they were after task 1.
"""

# B L D: batch, length, hidden_size; W width of a side column, R width of its lateral connection

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.continual.method import Method, Now
from bildung.continual.tasks import LabelledTexts, Task
from bildung.core.errors import SettingsError
from bildung.core.settings import settings
from bildung.model.encoder import Encoder
from bildung.model.store import LanguageModel
from bildung.model.taps import Attachment, attach, detach
from bildung.train.history import History
from bildung.tune.classifier_head import outer_matrix
from bildung.tune.forgetting import Forgetting


@settings
class ProgressiveSettings:
    """Progressive networks."""

    width: int = 96  # of a side column's vectors
    lateral: int = 48  # of what a block of it takes from the columns before
    learning_rate: float = 5e-3  # of side columns, which start from nothing

    def __post_init__(self) -> None:
        if self.width < 1 or self.lateral < 1 or not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"width = {self.width}, lateral = {self.lateral}, learning_rate = {self.learning_rate}; "
                f"the sizes must be at least 1, the rate above 0 and finite"
            )


class SideColumn(nn.Module):
    """One narrow column. before: side columns between the model and this one."""

    def __init__(self, hidden_size: int, layers: int, width: int, lateral: int, before: int):
        super().__init__()
        reads = hidden_size + before * width
        self.W = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.V = nn.ModuleList(nn.Linear(reads, lateral) for _ in range(layers))
        self.U = nn.ModuleList(nn.Linear(lateral, width, bias=False) for _ in range(layers))
        self.alpha = nn.Parameter(torch.ones(layers, before + 1))
        self.P = nn.Linear(width, hidden_size, bias=False)

    def draw(self, generator: torch.Generator) -> None:
        """First values: matrices of variance 1 / inputs, P = 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and name != "alpha":
                parameter.data.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            elif name != "alpha":
                parameter.data.zero_()
        self.P.weight.data.zero_()

    def step(self, layer: int, s_BLW: Tensor, earlier: list[Tensor]) -> Tensor:
        """s after block `layer`. earlier: the streams there of the columns before, the model's first."""
        read = [alpha * F.layer_norm(h, h.shape[-1:]) for alpha, h in zip(self.alpha[layer], earlier, strict=True)]
        lateral_BLW = self.U[layer](F.gelu(self.V[layer](torch.cat(read, dim=-1))))
        return s_BLW + F.gelu(self.W[layer](s_BLW) + lateral_BLW)


class Columns(Attachment):
    """All side columns of a model, and which of them speaks: 0, the model alone; n, the n-th side column."""

    def __init__(self, hidden_size: int, layers: int, width: int, lateral: int, count: int, active: int):
        super().__init__()
        self.sizes = {"hidden_size": hidden_size, "layers": layers, "width": width, "lateral": lateral}
        self.reads = tuple(f"layers.{layer}.resid_post" for layer in range(layers))
        self.columns = nn.ModuleList(SideColumn(**self.sizes, before=before) for before in range(count))
        self.active = active
        self.streams: list[Tensor] = []  # of the forward pass that is under way, one per side column

    @property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        """As the file keeps them: what is active now is active after loading."""
        return {**self.sizes, "count": len(self.columns), "active": self.active}

    def see(self, site: str, x_BLD: Tensor) -> None:
        """A block of the model is done: the columns that take part do theirs."""
        layer = int(site.split(".")[1])
        if layer == 0:
            width = self.sizes["width"]
            self.streams = [torch.zeros(*x_BLD.shape[:-1], width, device=x_BLD.device)] * self.active
        earlier = [x_BLD.detach().float()]
        for number in range(self.active):
            column = cast(SideColumn, self.columns[number])
            self.streams[number] = column.step(layer, self.streams[number], earlier)
            earlier = [*earlier, self.streams[number].detach()]

    def forward(self, x: Tensor) -> Tensor:
        """x_BLD, or x_BD of the first token."""
        if not self.active:
            return x
        s_BLW, self.streams = self.streams[self.active - 1], []
        added: Tensor = cast(SideColumn, self.columns[self.active - 1]).P(s_BLW if x.ndim == 3 else s_BLW[:, 0])
        return x + added.to(x.dtype)


class Progressive(Method):
    """A column per task."""

    def __init__(self, given: ProgressiveSettings):
        super().__init__()
        self.given = given
        self.before: dict[str, Tensor] = {}  # the head's parameters before the task

    def prepare(self, now: Now, lm: LanguageModel) -> None:
        """Freezes everything and adds the task's column; the first task trains the model."""
        if isinstance(now.kind, LabelledTexts) and not now.kind.own_heads:
            raise SettingsError(
                "a progressive network has a column per task and must be told the task; use heads own, "
                "or another method with heads shared."
            )
        if now.number == 1:
            super().prepare(now, lm)
            return
        lm.model.requires_grad_(False)
        add_column(lm, self.given, now.given.seed * 1009 + now.number)
        if (head := outer_matrix(lm.model)) is not None:
            head.requires_grad_(True)
            self.before = {name: one.detach().clone() for name, one in head.named_parameters()}

    def training(self, now: Now) -> Forgetting:
        if now.number == 1:
            return now.given
        # Nothing goes back through the blocks, so nothing of them is kept; run again, they would step the columns.
        return replace(now.given, learning_rate=self.given.learning_rate, recompute="none")

    def finish(self, now: Now, lm: LanguageModel, task: Task, history: History) -> None:
        self.settle(now, lm)

    def settle(self, now: Now, lm: LanguageModel) -> None:
        """Weight decay may have moved the head's rows of other tasks: they are put back."""
        head = outer_matrix(lm.model)
        if now.number == 1 or head is None or not isinstance(now.kind, LabelledTexts):
            return
        others = sorted(set(range(head.out_features)) - set(now.kind.rows_of(now.number - 1)))
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                parameter[others] = self.before[name][others]

    def select(self, lm: LanguageModel, number: int) -> None:
        """Task 1 has no side column; a task that was not learned yet gets the newest."""
        if (columns := columns_of(lm)) is not None:
            columns.active = min(number - 1, len(columns.columns))


def add_column(lm: LanguageModel, given: ProgressiveSettings, seed: int) -> Columns:
    """One more side column, which trains and speaks; those before stay as they are. Sizes are those of the first."""
    old, site = columns_of(lm), site_of(lm)
    if old is None:
        layers = lm.config.num_hidden_layers
        made = Columns(lm.config.hidden_size, layers, given.width, given.lateral, count=1, active=1)
    else:
        made = Columns(**old.sizes, count=len(old.columns) + 1, active=len(old.columns) + 1)
        made.columns[:-1].load_state_dict(old.columns.state_dict())
        detach(lm.model, site)
    newest = cast(SideColumn, made.columns[-1])
    newest.draw(torch.Generator().manual_seed(seed))
    made.requires_grad_(False)
    newest.requires_grad_(True)
    attach(lm.model, site, made.to(lm.model.device))
    return made


def site_of(lm: LanguageModel) -> str:
    """Where side columns join the model."""
    return "pooled" if isinstance(lm.model, Encoder) else "norm"


def columns_of(lm: LanguageModel) -> Columns | None:
    """The side columns of a model, if it has any."""
    found = dict(lm.model.attached.items()).get(site_of(lm))
    return found if isinstance(found, Columns) else None

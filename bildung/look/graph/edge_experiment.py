"""Pairs of prompts run through a model's graph: the metric, with any set of edges cut.

What a cut edge carries instead (`ablation`):

    resample   what the sender wrote in the corrupted run: the input stays one the model could have met (default)
    mean       what it wrote on the corrupted prompts of the same length, on average
    zero       nothing; far from anything the model knows, and much the worst (Conmy et al. 2023, their table 2)
"""

# U senders, R receivers, B rows, L tokens, D hidden_size, V vocabulary

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bildung.look.causal.answer_metrics import MetricName, answer_metric, check_metric
from bildung.look.causal.patching import Answers
from bildung.look.causal.prompt_pairs import PairBatch, Pairs
from bildung.look.graph.edges import EdgeRun, Norms
from bildung.look.graph.graph import Graph

Ablation = Literal["resample", "mean", "zero"]
Edge = tuple[str, str]


@dataclass(frozen=True)
class Side:
    """A batch with what is known of its two runs."""

    batch: PairBatch
    clean_UBLD: Tensor
    other_UBLD: Tensor  # what cut edges carry
    clean_BV: Tensor


class EdgeExperiment:
    """A model, pairs, a metric, and what stands in for a cut edge."""

    def __init__(
        self,
        model: Answers,
        pairs: Pairs,
        metric: MetricName = "logit_difference",
        ablation: Ablation = "resample",
        *,
        norms: Norms = "exact",
        batch_size: int = 8,
    ):
        check_metric(metric, pairs)
        self.model, self.metric, self.ablation, self.count = model, metric, ablation, len(pairs.rows)
        self.edges = EdgeRun(model, norms)
        self.graph: Graph = self.edges.graph
        self.sides = [self._side(batch) for batch in pairs.batches(batch_size, model.device)]
        self.clean = self.value(self.no_cut())
        self.corrupted = self.value(self.graph.allowed_UR.float().to(model.device))

    @torch.no_grad()
    def _side(self, batch: PairBatch) -> Side:
        clean_UBLD, clean_BV = self.edges.outputs(batch.clean_BL)
        other_UBLD, _ = self.edges.outputs(batch.corrupted_BL)
        if self.ablation == "mean":
            other_UBLD = other_UBLD.mean(1, keepdim=True).expand_as(other_UBLD)
        elif self.ablation == "zero":
            other_UBLD = torch.zeros_like(other_UBLD)
        return Side(batch, clean_UBLD, other_UBLD, clean_BV)

    def no_cut(self) -> Tensor:
        """A matrix UR with nothing cut."""
        return torch.zeros(self.graph.allowed_UR.shape, device=self.model.device)

    def cutting(self, edges: Iterable[Edge]) -> Tensor:
        """The matrix that cuts these edges."""
        cut_UR = self.no_cut()
        for sender, receiver in edges:
            cut_UR[self.graph.index(sender, receiver)] = 1
        return cut_UR

    def keeping(self, edges: Iterable[Edge]) -> Tensor:
        """The matrix that cuts all edges but these."""
        return self.graph.allowed_UR.float().to(self.model.device) - self.cutting(edges)

    def measure(self, side: Side, logits_BV: Tensor) -> Tensor:
        """The metric B of a batch."""
        return answer_metric(self.metric, logits_BV, side.batch.rows, side.clean_BV)

    @torch.no_grad()
    def value(self, cut_UR: Tensor) -> float:
        """The mean metric of the clean prompts with these edges cut."""
        total = 0.0
        for side in self.sides:
            logits_BV, _ = self.edges.run(side.batch.clean_BL, cut_UR, side.other_UBLD)
            total += self.measure(side, logits_BV).sum().item()
        return total / self.count

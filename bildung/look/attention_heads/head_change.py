"""Which heads moved from one model to another: where they look, what they write, and what they are good at.

    moved       share of its attention that a head spends elsewhere in B     ½ Σ_s |p_B - p_A|, mean over positions
    written     |r_B - r_A| / |r_A|, r what the head adds to the stream      over all positions but the first
    behaviour   B's score minus A's: induction, previous token ... on random tokens that come twice (head_scores.py)

`moved` sees changes of queries and keys alone; a head whose values or outputs were tuned looks where it did and says
something else, which `written` sees. Both also see what changed in the layers below: the first layer that stands out,
not the highest number, is where to look; the weights' change and the patches say which heads changed themselves.
"""

# N layers, H heads, L positions, D hidden_size

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.look.asked import stack_prefix
from bildung.look.attention_heads.attention_patterns import moved, pattern_difference
from bildung.look.attention_heads.head_scores import head_scores, repeated_tokens
from bildung.model.store import LanguageModel
from bildung.model.taps import Tap, intervene

STRETCH, ROWS = 24, 4  # of the random tokens


@dataclass(frozen=True)
class HeadChange:
    """layers x heads each; behaviour: name -> (A, B), empty where a model is too small to be tried, and why."""

    moved_NH: Tensor
    written_NH: Tensor
    behaviour: dict[str, tuple[Tensor, Tensor]]
    why_no_behaviour: str = ""

    @property
    def differences(self) -> dict[str, Tensor]:
        """Everything as one number per head."""
        return {"moved": self.moved_NH, "written": self.written_NH} | {
            name: b - a for name, (a, b) in self.behaviour.items()
        }


@torch.no_grad()
def head_change(a: LanguageModel, b: LanguageModel, ids: list[int], *, seed: int = 0) -> HeadChange:
    """Both models' heads on one text. Raises DataError when they have other layers or heads."""
    first, second = pattern_difference(a, b, torch.tensor(ids), max_tokens=len(ids))
    written_NH = written(a, b, ids)
    try:
        stretch = min(STRETCH, (min(lm.config.max_position_embeddings for lm in (a, b)) - 1) // 2)
        repeats = repeated_tokens(a, stretch=stretch, rows=ROWS, seed=seed)
        scores_a, scores_b = head_scores(a, repeats).scores, head_scores(b, repeats).scores
    except DataError as error:
        return HeadChange(moved(first, second), written_NH, {}, str(error))
    behaviour = {name: (scores_a[name].cpu(), scores_b[name].cpu()) for name in scores_a if name in scores_b}
    return HeadChange(moved(first, second), written_NH, behaviour)


def written(a: LanguageModel, b: LanguageModel, ids: list[int]) -> Tensor:
    """N x H: how far what each head adds to the stream is from what it adds in A, in units of its length there."""
    start = 1 if len(ids) > 1 else 0  # the first token's vector is often far longer than all others
    kept: list[dict[int, Tensor]] = []
    for lm in (a, b):
        found: dict[int, Tensor] = {}
        kept.append(found)

        def keeper(number: int, found: dict[int, Tensor]) -> Tap:
            def keep(result_BLND: Tensor) -> None:
                found[number] = result_BLND[0, start:].float().cpu()

            return keep

        prefix = stack_prefix(lm.model)
        taps = {f"{prefix}layers.{n}.attn.result": keeper(n, found) for n in range(lm.config.num_hidden_layers)}
        with intervene(lm.model, taps):
            lm.model.hidden(torch.tensor([ids], device=lm.model.device))
    rows = []
    for number in sorted(kept[0]):
        x_LND, y_LND = kept[0][number], kept[1][number]
        rows.append(_length(y_LND - x_LND) / _length(x_LND).clamp_min(1e-12))
    return torch.stack(rows)


def _length(x_LND: Tensor) -> Tensor:
    return x_LND.pow(2).sum((0, 2)).sqrt()

"""Running a model with some of its graph's edges cut (graph.py): the sender as it was in another run, for one receiver.

A receiver reads x = sum of senders, so an edge is a summand that can be exchanged for what the sender wrote elsewhere
(in the corrupted run: resample ablation):

    x_r = stream + sum over cut edges u -> r of (other_u - now_u)

`now_u` is what u writes in this very run, after all that was cut below it: cutting edges composes. All receivers of a
layer do this in one forward pass, from taps at q, k, v and mlp.in.
"""

# U senders, R receivers, B rows, L tokens, D hidden_size, N heads, K key-value heads, H head_dim

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.look.graph import graph_of
from bildung.look.patching import last_logits
from bildung.model.base import CausalLM
from bildung.model.layers import LayerNorm, RMSNorm
from bildung.model.linear import Linear
from bildung.model.taps import Tap, intervene
from bildung.model.transformer import Decoder

Norms = Literal["exact", "frozen"]


def frozen_norm(norm: nn.Module | None, x_BLD: Tensor, change: Tensor) -> Tensor:
    """What `change` adds to norm(x) if the norm's scale stays that of x: the norm as a linear map."""
    if norm is None or isinstance(norm, nn.Identity):
        return change
    if isinstance(norm, RMSNorm):
        return change * torch.rsqrt(x_BLD.pow(2).mean(-1, keepdim=True) + norm.eps) * (norm.weight + norm.offset)
    if isinstance(norm, LayerNorm):
        centred = change - change.mean(-1, keepdim=True)
        return centred * torch.rsqrt(x_BLD.var(-1, unbiased=False, keepdim=True) + norm.eps) * norm.weight
    raise SettingsError(f"a {type(norm).__name__} has no linear form; use the exact path patching.")


class EdgeRun:
    """Forward passes of one model in which edges are cut.

    norms: "frozen" carries a change through a receiver's norm with the scale of this run's stream (linear path
    patching); "exact" computes the norm anew.
    """

    def __init__(self, model: CausalLM, norms: Norms = "exact"):
        self.model, self.graph, self.norms = cast(Decoder, model), graph_of(model), norms
        self.blocks = list(self.model.model.layers)
        self._weights: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}

    @torch.no_grad()
    def outputs(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """What every sender writes, UBLD, and the logits BV, with nothing cut."""
        nothing_UR = torch.zeros(self.graph.allowed_UR.shape, device=tokens_BL.device)
        taken = _Pass(self, nothing_UR, None, None)
        logits_BV = taken.logits(tokens_BL)
        return taken.written(), logits_BV

    def run(self, tokens_BL: Tensor, cut_UR: Tensor, other_UBLD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits BV of a run where cut edges carry `other`; and what every sender wrote, UBLD.

        cut_UR: 1 where an edge is cut, 0 where it is as it is; between them, so much of it.
        """
        taken = _Pass(self, cut_UR, other_UBLD, None)
        logits_BV = taken.logits(tokens_BL)
        return logits_BV, taken.written()

    def run_fixed(
        self, tokens_BL: Tensor, cut_UR: Tensor, difference_UBLD: Tensor, embedded_BLD: Tensor | None = None
    ) -> Tensor:
        """Logits BV where a cut edge adds a given difference; its gradient by `cut_UR` is what EAP is. `embedded`: what
        stands in place of what the embedding writes."""
        return _Pass(self, cut_UR, None, difference_UBLD, embedded_BLD).logits(tokens_BL)

    def weights(self, layer: int, word: str) -> tuple[Tensor, Tensor | None]:
        """A projection's matrix by heads (q, k, v: (heads, H, D); o: (N, D, H)), adapters and all, and its bias."""
        if (layer, word) not in self._weights:
            attention = cast(nn.Module, self.blocks[layer].self_attn)
            weight, bias = cast(Linear, getattr(attention, f"{word}_proj")).effective(self.model.dtype)
            size = self.model.config.head_dim
            if word == "o":
                shaped = weight.unflatten(1, (-1, size)).permute(1, 0, 2)
            else:
                shaped = weight.unflatten(0, (-1, size))
            bias = None if bias is None or word == "o" else bias.to(weight.dtype).unflatten(0, (-1, size))
            self._weights[layer, word] = shaped.detach(), None if bias is None else bias.detach()
        return self._weights[layer, word]


class _Pass:
    """One forward pass: the taps, and what they remember of it."""

    def __init__(
        self,
        edges: EdgeRun,
        cut_UR: Tensor,
        other_UBLD: Tensor | None,
        difference_UBLD: Tensor | None,
        embedded_BLD: Tensor | None = None,
    ):
        self.edges, self.graph, self.cut_UR = edges, edges.graph, cut_UR
        self.other_UBLD, self.embedded_BLD, self.difference_UBLD = other_UBLD, embedded_BLD, difference_UBLD
        self.fixed = difference_UBLD is not None
        self.stream_BLD = torch.empty(0)

    def logits(self, tokens_BL: Tensor) -> Tensor:
        taps: dict[str, Tap] = {}
        for n, block in enumerate(self.edges.blocks):
            at = f"layers.{n}"
            taps[f"{at}.resid_pre"] = self._embedded if n == 0 else self._remember
            for word in "qkv":
                taps[f"{at}.attn.{word}"] = self._projected(n, word, block)
            if self.graph.mlps and not self.graph.parallel:
                taps[f"{at}.resid_mid"] = self._remember
            if self.graph.mlps:
                taps[f"{at}.mlp.in"] = self._mlp_reads(n, block)
            if not self.fixed:
                taps[f"{at}.attn.z"] = self._heads_write(n)
            if self.graph.mlps and not self.fixed:
                taps[f"{at}.mlp.out"] = self._mlp_writes(n)
        if self.edges.norms == "exact":
            taps[f"layers.{self.graph.layers - 1}.resid_post"] = self._last
        else:
            taps[f"layers.{self.graph.layers - 1}.resid_post"] = self._remember
            taps["norm"] = self._last_normed
        with intervene(self.edges.model, taps):
            return last_logits(self.edges.model, tokens_BL)

    def written(self) -> Tensor:
        """What each sender wrote."""
        difference = cast(Tensor, self.difference_UBLD)
        return difference if self.other_UBLD is None else self.other_UBLD - difference

    # ── what senders write: kept as other - now, or as now where there is no other ──

    def _keep(self, where: slice, now_UBLD: Tensor) -> None:
        if self.difference_UBLD is None:
            self.difference_UBLD = now_UBLD.new_zeros(len(self.graph.senders), *now_UBLD.shape[1:])
        other = self.other_UBLD
        self.difference_UBLD[where] = now_UBLD if other is None else other[where] - now_UBLD

    def _embedded(self, x_BLD: Tensor) -> Tensor | None:
        x_BLD = x_BLD if self.embedded_BLD is None else self.embedded_BLD
        if not self.fixed:
            self._keep(slice(0, 1), x_BLD[None])
        self._remember(x_BLD)
        return self.embedded_BLD

    def _remember(self, x_BLD: Tensor) -> None:
        self.stream_BLD = x_BLD

    def _heads_write(self, layer: int) -> Tap:
        def tap(z_BLNH: Tensor) -> None:
            weight_NDH, _ = self.edges.weights(layer, "o")
            self._keep(self.graph.rows(layer), torch.einsum("blnh,ndh->nbld", z_BLNH, weight_NDH))

        return tap

    def _mlp_writes(self, layer: int) -> Tap:
        row = self.graph.rows(layer).stop
        return lambda x_BLD: self._keep(slice(row, row + 1), x_BLD[None])

    # ── what receivers read ──

    def _change(self, columns: slice) -> Tensor | None:
        """What the cut edges into some receivers change, RBLD; None where nothing is cut."""
        count = self.graph.below[columns.start]
        cut_UR = self.cut_UR[:count, columns]
        if not (cut_UR.requires_grad or cut_UR.any()):
            return None
        difference = cast(Tensor, self.difference_UBLD)[:count]
        return (cut_UR.T.to(difference.dtype) @ difference.flatten(1)).unflatten(1, difference.shape[1:])

    def _normed(self, norm: nn.Module | None, change: Tensor) -> Tensor:
        if self.edges.norms == "exact":
            x = self.stream_BLD + change
            return x if norm is None else norm(x)
        normed = self.stream_BLD if norm is None else norm(self.stream_BLD)
        return normed + frozen_norm(norm, self.stream_BLD, change)

    def _projected(self, layer: int, word: str, block: nn.Module) -> Tap:
        columns = self.graph.columns(layer, word)
        norm = cast(nn.Module, block.input_layernorm)
        head_norm = getattr(block.self_attn, f"{word}_norm", None)

        def tap(x_BLNH: Tensor) -> Tensor | None:
            change_RBLD = self._change(columns)
            if change_RBLD is None:
                return None
            weight_RHD, bias_RH = self.edges.weights(layer, word)
            made = torch.einsum("rbld,rhd->blrh", self._normed(norm, change_RBLD), weight_RHD)
            made = made if bias_RH is None else made + bias_RH
            made = made if head_norm is None else head_norm(made)
            touched = (
                self.cut_UR[:, columns].ne(0).any(0)[:, None]
            )  # heads with nothing cut stay as they are, to the bit
            return made if self.cut_UR.requires_grad else torch.where(touched, made, x_BLNH)

        return tap

    def _mlp_reads(self, layer: int, block: nn.Module) -> Tap:
        def tap(x_BLD: Tensor) -> Tensor | None:
            change = self._change(self.graph.columns(layer, "m"))
            return None if change is None else self._normed(cast(nn.Module, block.post_attention_layernorm), change[0])

        return tap

    def _last(self, x_BLD: Tensor) -> Tensor | None:
        change = self._change(slice(len(self.graph.receivers) - 1, None))
        return None if change is None else x_BLD + change[0]

    def _last_normed(self, x_BLD: Tensor) -> Tensor | None:
        change = self._change(slice(len(self.graph.receivers) - 1, None))
        return None if change is None else x_BLD + frozen_norm(self.edges.model.model.norm, self.stream_BLD, change[0])

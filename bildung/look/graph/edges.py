"""Running a model with some of its graph's edges cut (graph.py): the sender as it was in another run, for one receiver.

A receiver reads x = sum of senders, so an edge is a summand that can be exchanged for what the sender wrote elsewhere
(in the corrupted run: resample ablation):

    x_r = stream + sum over cut edges u -> r of (other_u - now_u)

`now_u` is what u writes in this very run, after all that was cut below it: cutting edges composes. All receivers of a
layer do this in one forward pass, from taps at q, k, v and mlp.in.

An encoder-decoder (asked.py) has two streams. The keys and values of the heads that look at the source read the
encoder's, through its final norm; the tensors of what senders write are as long as the longer stream, zeros after it.
"""

# U senders, R receivers, B rows, L tokens (of the longer stream), D hidden_size, N heads, K key-value heads, H head_dim

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.look.asked import Asked, whole_of
from bildung.look.attention_heads.head_weights import stack_of
from bildung.look.causal.patching import Answers, last_logits
from bildung.look.graph.graph import graph_of
from bildung.model.block import Block
from bildung.model.layers import LayerNorm, RMSNorm
from bildung.model.linear import Linear
from bildung.model.taps import Tap, intervene

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

    def __init__(self, model: Answers, norms: Norms = "exact"):
        self.model, self.graph, self.norms = model, graph_of(model), norms
        stacks = {"e.": "encoder.", "": "decoder." if self.graph.encoder is not None else ""}
        self.prefixes = {half: stacks[half] for half in self.graph.halves}  # of the stacks' sites
        whole = whole_of(model)
        self.stacks = {half: stack_of(whole, prefix) for half, prefix in self.prefixes.items()}
        self._weights: dict[tuple[str, int, str], tuple[Tensor, Tensor | None]] = {}

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

    def block(self, half: str, layer: int) -> Block:
        """A layer."""
        return cast(Block, self.stacks[half].layers[layer])

    def weights(self, half: str, layer: int, word: str) -> tuple[Tensor, Tensor | None]:
        """A projection's matrix by heads (aq, ak, av, cq ...: (heads, H, D); ao, co: (N, D, H)), adapters and all, and
        its bias."""
        if (half, layer, word) not in self._weights:
            block = self.block(half, layer)
            attention = block.self_attn if word[0] == "a" else block.cross_attn
            weight, bias = cast(Linear, getattr(attention, f"{word[1]}_proj")).effective(self.model.dtype)
            size = attention.head_dim
            if word[1] == "o":
                shaped = weight.unflatten(1, (-1, size)).permute(1, 0, 2)
            else:
                shaped = weight.unflatten(0, (-1, size))
            bias = None if bias is None or word[1] == "o" else bias.to(weight.dtype).unflatten(0, (-1, size))
            self._weights[half, layer, word] = shaped.detach(), None if bias is None else bias.detach()
        return self._weights[half, layer, word]


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
        self.stream_BLD = self.source_BLD = torch.empty(0)
        self.longest = 0

    def logits(self, tokens_BL: Tensor) -> Tensor:
        answer = self.edges.model.answer if isinstance(self.edges.model, Asked) else ()
        self.longest = max(tokens_BL.shape[1], len(answer))
        taps: dict[str, Tap] = {}
        for half, prefix in self.edges.prefixes.items():
            graph = self.graph.halves[half]
            for n in range(graph.layers):
                self._listen(taps, half, n, f"{prefix}layers.{n}")
        prefix = self.edges.prefixes[""]
        last = f"{prefix}layers.{self.graph.layers - 1}.resid_post"
        taps[last] = self._last if self.edges.norms == "exact" else self._remember
        if self.edges.norms == "frozen":
            taps[f"{prefix}norm"] = self._last_normed
        with intervene(self.edges.model, taps):
            return last_logits(self.edges.model, tokens_BL)

    def _listen(self, taps: dict[str, Tap], half: str, n: int, at: str) -> None:
        """Taps of one layer."""
        graph, block = self.graph.halves[half], self.edges.block(half, n)
        taps[f"{at}.resid_pre"] = self._remember if n else self._embedded(half)
        for kind, site in {"a": "attn", "c": "cross"}.items() if block.cross else [("a", "attn")]:
            for word in "qkv":
                taps[f"{at}.{site}.{word}"] = self._projected(half, n, kind + word, block)
            if not self.fixed:
                taps[f"{at}.{site}.z"] = self._heads_write(half, n, kind)
        if block.cross or (graph.mlps and not graph.parallel):
            taps[f"{at}.resid_mid"] = self._remember
        if block.cross:
            taps[f"{at}.resid_cross"] = self._remember
        if graph.mlps:
            taps[f"{at}.mlp.in"] = self._mlp_reads(half, n, block)
            if not self.fixed:
                taps[f"{at}.mlp.out"] = self._mlp_writes(half, n)
        if half and n == graph.layers - 1:
            taps[f"{at}.resid_post"] = self._read_source

    def written(self) -> Tensor:
        """What each sender wrote."""
        difference = cast(Tensor, self.difference_UBLD)
        return difference if self.other_UBLD is None else self.other_UBLD - difference

    # ── what senders write: kept as other - now, or as now where there is no other ──

    def _keep(self, where: slice, now_UBLD: Tensor) -> None:
        beyond = (0, 0, 0, self.longest - now_UBLD.shape[2])
        now_UBLD = now_UBLD if beyond[3] == 0 else F.pad(now_UBLD, beyond)
        if self.difference_UBLD is None:
            self.difference_UBLD = now_UBLD.new_zeros(len(self.graph.senders), *now_UBLD.shape[1:])
        other = self.other_UBLD
        self.difference_UBLD[where] = now_UBLD if other is None else other[where] - now_UBLD

    def _embedded(self, half: str) -> Tap:
        given = self.embedded_BLD if half == next(iter(self.graph.halves)) else None  # what is read, not the answer

        def tap(x_BLD: Tensor) -> Tensor | None:
            put_BLD = None if given is None else given[:, : x_BLD.shape[1]]
            x_BLD = x_BLD if put_BLD is None else put_BLD
            if not self.fixed:
                self._keep(self.graph.rows(-1, "embed", half), x_BLD[None])
            self._remember(x_BLD)
            return put_BLD

        return tap

    def _remember(self, x_BLD: Tensor) -> None:
        self.stream_BLD = x_BLD

    def _read_source(self, x_BLD: Tensor) -> None:
        self.source_BLD = x_BLD

    def _heads_write(self, half: str, layer: int, kind: str) -> Tap:
        def tap(z_BLNH: Tensor) -> None:
            weight_NDH, _ = self.edges.weights(half, layer, f"{kind}o")
            self._keep(self.graph.rows(layer, kind, half), torch.einsum("blnh,ndh->nbld", z_BLNH, weight_NDH))

        return tap

    def _mlp_writes(self, half: str, layer: int) -> Tap:
        row = self.graph.rows(layer, "m", half)
        return lambda x_BLD: self._keep(row, x_BLD[None])

    # ── what receivers read ──

    def _change(self, columns: slice, length: int) -> Tensor | None:
        """What the cut edges into some receivers change, RBLD; None where nothing is cut."""
        rows = slice(*self.graph.reads[columns.start])
        cut_UR = self.cut_UR[rows, columns]
        if not (cut_UR.requires_grad or cut_UR.any()):
            return None
        difference = cast(Tensor, self.difference_UBLD)[rows, :, :length]
        return (cut_UR.T.to(difference.dtype) @ difference.flatten(1)).unflatten(1, difference.shape[1:])

    def _normed(self, norm: nn.Module | None, stream_BLD: Tensor, change: Tensor) -> Tensor:
        if self.edges.norms == "exact":
            x = stream_BLD + change
            return x if norm is None else norm(x)
        normed = stream_BLD if norm is None else norm(stream_BLD)
        return normed + frozen_norm(norm, stream_BLD, change)

    def _projected(self, half: str, layer: int, word: str, block: Block) -> Tap:
        columns, of_source = self.graph.columns(layer, word, half), word in ("ck", "cv")
        norm = block.input_layernorm if word[0] == "a" else block.cross_layernorm
        if of_source:  # read from what the encoder hands over, behind its final norm
            norm = cast(nn.Module, self.edges.stacks["e."].norm)
        head_norm = getattr(block.self_attn, f"{word[1]}_norm", None) if word[0] == "a" else None

        def tap(x_BLNH: Tensor) -> Tensor | None:
            change_RBLD = self._change(columns, x_BLNH.shape[1])
            if change_RBLD is None:
                return None
            weight_RHD, bias_RH = self.edges.weights(half, layer, word)
            normed_RBLD = self._normed(norm, self.source_BLD if of_source else self.stream_BLD, change_RBLD)
            made = torch.einsum("rbld,rhd->blrh", normed_RBLD, weight_RHD)
            made = made if bias_RH is None else made + bias_RH
            made = made if head_norm is None else head_norm(made)
            touched = (
                self.cut_UR[:, columns].ne(0).any(0)[:, None]
            )  # heads with nothing cut stay as they are, to the bit
            return made if self.cut_UR.requires_grad else torch.where(touched, made, x_BLNH)

        return tap

    def _mlp_reads(self, half: str, layer: int, block: Block) -> Tap:
        columns = self.graph.columns(layer, "m", half)

        def tap(x_BLD: Tensor) -> Tensor | None:
            change = self._change(columns, x_BLD.shape[1])
            return None if change is None else self._normed(block.post_attention_layernorm, self.stream_BLD, change[0])

        return tap

    def _last(self, x_BLD: Tensor) -> Tensor | None:
        change = self._change(slice(len(self.graph.receivers) - 1, None), x_BLD.shape[1])
        return None if change is None else x_BLD + change[0]

    def _last_normed(self, x_BLD: Tensor) -> Tensor | None:
        change = self._change(slice(len(self.graph.receivers) - 1, None), x_BLD.shape[1])
        norm = self.edges.stacks[""].norm
        return None if change is None else x_BLD + frozen_norm(norm, self.stream_BLD, change[0])

"""Direct logit attribution: a logit as a sum over what every head, feed-forward layer and bias wrote into the stream.

    logit = W_U · norm(embed + Σ heads + Σ mlps + Σ biases)         at one position

Every step from a writer to the logits is linear, once the norms' scales are kept at what they were in this pass, so the
logit's direction is pulled back through the frozen steps, layer by layer, and each writer's share is one inner product
with it (Elhage et al. 2021, "direct path"; McDougall's and TransformerLens's `logit_attrs` do the same forwards).
The shares add up to the logit. Pre-norm, sandwich, parallel and post-norm stacks differ in which norms lie between. The
decoder of an encoder-decoder has heads that look at the source too; the encoder speaks through them alone. The score of
a class of a decoder with classes instead of tokens is a sum in the same way.

What a share is not: how the logit would change without the head. That would change the norms, and all that reads it.
A family's soft-cap of logits is not linear; shares add up to the logit before it.
"""

# T directions, C writers, N layers, H heads, F neurons, D hidden_size, S positions that are looked at

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from bildung.core.errors import DataError
from bildung.look.asked import WithSource, stack_prefix
from bildung.look.attention_heads.head_weights import stack_of
from bildung.model.attention import Attention
from bildung.model.block import Block
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.encoder_decoder import EncoderDecoder
from bildung.model.layers import BatchNorm, LayerNorm, RMSNorm
from bildung.model.linear import Linear
from bildung.model.taps import observe
from bildung.model.transformer import Backbone, Decoder

READ = ("resid_pre", "resid_mid", "resid_cross", "resid_post", ".z", ".out", "mlp.act", "embed", "norm")


@dataclass
class Decomposition:
    """Shares of directions, usually logits, at one position. {name: share of each direction} in forward order."""

    # "embed", "layers.3.attn.head.2", "layers.3.cross.head.2", "layers.3.mlp", "layers.3.attn.bias", "norm.bias" ...
    shares: dict[str, Tensor]
    neurons_NFT: Tensor | None  # of the feed-forward layers' hidden units; None without such layers
    sources_NHST: Tensor | None  # a head's share by the position it came from; None behind virtual tokens
    logits_T: Tensor  # the sum to be explained, before a soft-cap: W_U · h + bias, from the final states
    cross_sources_NHST: Tensor | None = None  # of heads that look at a source, by its positions

    def matrix(self) -> Tensor:
        """CT: all shares."""
        return torch.stack(list(self.shares.values()))

    def heads_NHT(self, kind: str = "attn") -> Tensor:
        """The heads' shares; kind "cross": of those that look at a source."""
        layers = 1 + max(int(name.split(".")[1]) for name in self.shares if f".{kind}.head." in name)
        heads = sum(name.startswith(f"layers.0.{kind}.head.") for name in self.shares)
        names = [[f"layers.{n}.{kind}.head.{h}" for h in range(heads)] for n in range(layers)]
        return torch.stack([torch.stack([self.shares[name] for name in row]) for row in names])


@dataclass
class _Pull:
    """The directions on their way down, and the shares found so far, last first."""

    u_TD: Tensor
    shares: list[tuple[str, Tensor]] = field(default_factory=list)

    def through(self, norm: nn.Module | None, x_D: Tensor, name: str, u_TD: Tensor) -> Tensor:
        """The directions below a norm that had `x` before it; its bias gets its share."""
        if norm is None:
            return u_TD
        x_D, weight_D = x_D.double(), cast(Tensor, norm.weight).double()
        bias_D: Tensor | None = None
        if isinstance(norm, RMSNorm):
            scale = torch.rsqrt(x_D.square().mean() + norm.eps)
            below_TD = u_TD * ((weight_D + norm.offset) * scale)
        elif isinstance(norm, LayerNorm):
            weighted_TD = u_TD * (weight_D * torch.rsqrt(x_D.var(unbiased=False) + norm.eps))
            below_TD, bias_D = weighted_TD - weighted_TD.mean(-1, keepdim=True), norm.bias.double()
        elif isinstance(norm, BatchNorm):
            weight_D = weight_D * torch.rsqrt(norm.running_var.double() + norm.eps)
            below_TD, bias_D = u_TD * weight_D, norm.bias.double() - norm.running_mean.double() * weight_D
        else:
            raise DataError(
                f"a {type(norm).__name__} has no frozen form; attribution knows RMS, layer and batch norms."
            )
        self.add(name, None if bias_D is None else u_TD @ bias_D)
        return below_TD

    def add(self, name: str, share_T: Tensor | None) -> None:
        if share_T is not None:
            self.shares.append((name, share_T))


Attributed = Decoder | DecoderClassifier | WithSource


@torch.no_grad()
def decompose(model: Attributed, tokens_1L: Tensor, u_TV: Tensor | list[int], position: int = -1) -> Decomposition:
    """Shares of logits at one position of a text, or of the answer to a source (`with_source`).

    u_TV: rows of weights on logits (a difference: +1 and -1), or a list of token (class) numbers, one direction each.
    position: absolute; negative from the end. Raises DataError for what is no decoder, for a position that is not
    there, and for attached modules whose share nobody could name.
    """
    prefix = _check(model, tokens_1L, position)
    place = position % tokens_1L.shape[1]
    stack = cast(Backbone, stack_of(model, prefix))
    wanted = [site for site in model.sites if site.startswith(prefix) and site.endswith(READ)]
    looks = [site for site in model.sites if site.startswith(prefix) and site.endswith((".probs", ".v"))]
    at = [f"{site}[L={place}]" for site in (*wanted, *looks) if not site.endswith(".v")]
    with observe(model, [*at, *(site for site in looks if site.endswith(".v"))]) as seen:
        model.hidden(tokens_1L)
    found = {site.removeprefix(prefix): x for site, x in seen.items()}
    x = {site: tensor[0, 0] for site, tensor in found.items() if not site.endswith((".v", ".probs"))}
    linear = model.score if isinstance(model, DecoderClassifier) else model.lm_head
    head = linear.weight().double()
    chosen = u_TV if isinstance(u_TV, Tensor) else None
    u_TD = head[torch.tensor(u_TV, device=head.device)] if chosen is None else chosen.double() @ head
    u_TD = u_TD * (1.0 if isinstance(model, DecoderClassifier) else model.config.logit_scale)
    pull = _Pull(u_TD)
    logits_T = u_TD @ x["norm"].double()
    if (bias_V := _bias_of(model, linear)) is not None:
        pull.add("logits.bias", bias_V[torch.tensor(u_TV)] if chosen is None else chosen.double() @ bias_V)
        logits_T = logits_T + pull.shares[-1][1]
    last = f"layers.{len(stack.layers) - 1}.resid_post"
    pull.u_TD = pull.through(stack.norm, x[last], "norm.bias", u_TD)
    neurons: list[Tensor | None] = []
    sources: dict[str, list[Tensor | None]] = {"attn": [], "cross": []}
    for layer in reversed(range(len(stack.layers))):
        block, site = cast(Block, stack.layers[layer]), f"layers.{layer}"
        neurons.append(_feed_forward(pull, block, site, x))
        for kind in ("cross", "attn") if block.cross else ("attn",):
            weights_HDT = _attention(pull, block, site, kind, x)
            v_SKH, probs_HS = (found[f"{site}.{kind}.{word}"][0].double() for word in ("v", "probs"))
            sources[kind].append(_by_source(weights_HDT, v_SKH, probs_HS[:, 0]))
    _bottom(pull, stack, x)
    return Decomposition(
        shares=dict(reversed(pull.shares)),
        neurons_NFT=_stacked(neurons),
        sources_NHST=_stacked(sources["attn"]),
        logits_T=logits_T,
        cross_sources_NHST=_stacked(sources["cross"]),
    )


def _stacked(last_first: list[Tensor | None]) -> Tensor | None:
    there = [one for one in reversed(last_first) if one is not None]
    return torch.stack(there) if there and len(there) == len(last_first) else None


def _bias_of(model: Attributed, linear: Linear) -> Tensor | None:
    """What is added to every logit whatever the text: the head's own bias, and BART's and Marian's."""
    more: Tensor | None = getattr(getattr(model, "whole", None), "final_logits_bias", None)
    biases = [one.double() for one in (linear.bias, None if more is None else more[0]) if one is not None]
    return torch.stack(biases).sum(0) if biases else None


def _feed_forward(pull: _Pull, block: Block, site: str, x: dict[str, Tensor]) -> Tensor | None:
    """The feed-forward half of a block, from its end; pulls the directions through it where norms lie on the stream.
    Returns the neurons' shares FT."""
    if block.attention_only:
        return None
    if block.post:
        entered = x[f"{site}.resid_cross" if block.cross else f"{site}.resid_mid"] + x[f"{site}.mlp.out"]
        pull.u_TD = pull.through(block.post_attention_layernorm, entered, f"{site}.mlp.norm.bias", pull.u_TD)
    u_TD = pull.u_TD if block.mlp_scale is None else pull.u_TD * block.mlp_scale.lambda1.double()
    u_TD = pull.through(block.mlp_out_layernorm, x[f"{site}.mlp.out"], f"{site}.mlp.norm.bias", u_TD)
    neurons_FT = _write(pull, block.mlp.down_proj, x[f"{site}.mlp.act"], u_TD, f"{site}.mlp.bias")
    pull.add(f"{site}.mlp", neurons_FT.sum(0))
    return neurons_FT


def _attention(pull: _Pull, block: Block, site: str, kind: str, x: dict[str, Tensor]) -> Tensor:
    """One attention of a block: "attn", or "cross", which looks at the source.

    Returns, for every head, what one unit of each of its z numbers adds: H D_head T.
    """
    attention: Attention = block.self_attn if kind == "attn" else block.cross_attn
    if block.post:
        norm, entered = (block.input_layernorm, "pre") if kind == "attn" else (block.cross_layernorm, "mid")
        before = x[f"{site}.resid_{entered}"] + x[f"{site}.{kind}.out"]
        pull.u_TD = pull.through(norm, before, f"{site}.{kind}.norm.bias", pull.u_TD)
    u_TD = pull.u_TD
    if kind == "attn":
        u_TD = u_TD if block.attn_scale is None else u_TD * block.attn_scale.lambda1.double()
        u_TD = pull.through(block.attn_out_layernorm, x[f"{site}.attn.out"], f"{site}.attn.norm.bias", u_TD)
    z_NH = x[f"{site}.{kind}.z"]
    parts_T = _write(pull, attention.o_proj, z_NH.flatten(), u_TD, f"{site}.{kind}.bias").unflatten(0, z_NH.shape)
    for number in reversed(range(len(parts_T))):
        pull.add(f"{site}.{kind}.head.{number}", parts_T[number].sum(0))
    weights_IT = attention.o_proj.weight().double().T @ u_TD.T
    return weights_IT.unflatten(0, z_NH.shape)


def _write(pull: _Pull, matrix: Linear, x_I: Tensor, u_TD: Tensor, bias: str) -> Tensor:
    """IT: what each input of a writing matrix adds to each direction; its bias gets a share of its own."""
    weight_DI, bias_D = matrix.effective(torch.float64)
    pull.add(bias, None if bias_D is None else u_TD @ bias_D)
    return x_I.double()[:, None] * (weight_DI.T @ u_TD.T)


def _by_source(weights_HDT: Tensor, v_SKD: Tensor, probs_HS: Tensor) -> Tensor | None:
    """H S T: a head's z is Σ_s probs_s v_s, so its share splits by where the values came from."""
    if v_SKD.shape[0] != probs_HS.shape[1]:
        return None
    v_SHD = v_SKD.repeat_interleave(len(weights_HDT) // v_SKD.shape[1], dim=1)
    return torch.einsum("hs,shd,hdt->hst", probs_HS, v_SHD, weights_HDT)


def _bottom(pull: _Pull, stack: Backbone, x: dict[str, Tensor]) -> None:
    """Token vectors, positions and segments, below all layers."""
    parts = {"embed": x["embed"]} | ({"pos_embed": x["pos_embed"]} if "pos_embed" in x else {})
    if stack.embed_norm is not None:
        pull.u_TD = pull.through(stack.embed_norm, sum(parts.values()), "embed.norm.bias", pull.u_TD)  # type: ignore[arg-type]
    for name, x_D in reversed(parts.items()):
        pull.add(name, pull.u_TD @ x_D.double())


def _check(model: Any, tokens_1L: Tensor, position: int) -> str:
    """The prefix of the stack that writes the logits. Raises DataError."""
    answers = isinstance(model, WithSource) and isinstance(model.whole, EncoderDecoder)
    if not (answers or isinstance(model, Decoder | DecoderClassifier)):
        config = getattr(model, "config", None)
        kind, heads = getattr(config, "kind", type(model).__name__), getattr(config, "heads", ())
        why = "its states are no sum of what its parts write"
        if kind == "encoder":
            why = "between its states and its logits stands a layer that is not linear" if heads else "it has no head"
        raise DataError(
            f"logits of a Transformer's decoder are attributed; this is a model of kind {kind!r}, and {why}. "
            "Try `look saliency`."
        )
    if tokens_1L.ndim != 2 or len(tokens_1L) != 1:
        raise DataError(f"tokens of shape {tuple(tokens_1L.shape)} were given; one text, shape (1, length), is needed.")
    if not -tokens_1L.shape[1] <= position < tokens_1L.shape[1]:
        raise DataError(f"position {position} is not among the {tokens_1L.shape[1]} tokens of the prompt.")
    if attached := [key.replace("/", ".") for key in model.attached]:
        raise DataError(
            f"a module is attached at {attached[0]}, and what it adds belongs to no head and no matrix; detach it "
            "(bildung.detach) to attribute what the model itself writes."
        )
    return stack_prefix(model)

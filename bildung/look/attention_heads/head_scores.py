"""What heads do, seen on text without meaning: random tokens, then the same again (Olsson et al. 2022).

    BOS  a b c d ... z   a b c d ... z                one row: a stretch of S distinct random tokens, and copies of it
                         ^                            the second a can only be continued from the first stretch

    induction        attention from a token of a copy to the tokens that followed its earlier occurrences ("prefix
                     matching"): the place at distance S - 1. With several copies all those places count
    duplicate token  attention to the earlier occurrences themselves: distance S
    previous token   attention to the token before, mean over all positions but the first
    first token      attention to position 0, where heads look that have nothing to do, mean over the copies
    copying          what a head would add to the logits when it attends to one token of the first stretch: of all it
                     adds above the mean over the S tokens, the share that goes to the very token attended to; scaled so
                     that an even share is 0 and all of it 1. Olsson et al. measure the same share, over what the
                     head really attends to, on a scale of [-1, 1]

All but copying are mean attention, between 0 and 1. Each is the mean over queries that have such a place, and over
rows: a head that always looks there scores 1. (TransformerLens' detect_head divides by the attention of all rows, with
those of the first stretch, which rest on BOS, unless exclude_bos: its default gives a perfect induction head 0.49.)
"""

# R rows, L positions, S tokens of a stretch, N heads, K key-value heads, H head_dim, D hidden_size

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import DataError
from bildung.look.attention_heads.head_weights import LayerHeads, head_weights, unembedding
from bildung.look.precise import check_numbers
from bildung.model.base import CausalLM
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene
from bildung.train.objectives import surprisal


@dataclass(frozen=True)
class Repeats:
    """Rows of stretches that are repeated. begins: 1 after a BOS, else 0."""

    tokens_RL: Tensor
    stretch: int
    begins: int

    @property
    def copies(self) -> int:
        """How often each stretch stands there."""
        return (self.tokens_RL.shape[1] - self.begins) // self.stretch


@dataclass(frozen=True)
class HeadScores:
    """scores: name -> (layers, N). loss_L: mean nats of each token from those before it, () for no causal model."""

    scores: dict[str, Tensor]
    loss_L: Tensor
    repeats: Repeats

    def strongest(self, name: str, below: int | None = None) -> tuple[int, int]:
        """(layer, head) with the highest score; only of the layers below one."""
        scores = self.scores[name][:below]
        layer, head = divmod(int(scores.argmax()), scores.shape[1])
        return layer, head

    def stretch_loss(self, copy: int) -> float:
        """Mean loss in one of the copies, 0 for the first. Its first token is left out: nothing says it comes again."""
        start = self.repeats.begins + copy * self.repeats.stretch
        return float(self.loss_L[start + 1 : start + self.repeats.stretch].mean())

    @property
    def in_context(self) -> float:
        """Loss of the last copy minus that of the first: below 0 for who learns from context."""
        return self.stretch_loss(self.repeats.copies - 1) - self.stretch_loss(0)


def repeated_tokens(lm: LanguageModel, *, stretch: int = 50, copies: int = 2, rows: int = 8, seed: int = 0) -> Repeats:
    """Rows of distinct random tokens, none of them special, repeated; BOS before them where the tokenizer has one.

    Raises DataError for a vocabulary or a context that is too small, and for models that do not read one text.
    """
    prefix = getattr(lm.model, "stack", "")
    if f"{prefix}layers.0.attn.probs" not in lm.model.sites or lm.config.kind == "vision":
        raise DataError(f"a {lm.config.model_type} of kind {lm.config.kind!r} has no attention to text of its own.")
    special = set(lm.tokenizer.special_tokens.values())
    size = min(lm.tokenizer.vocab_size, lm.config.vocab_size)
    usable = torch.tensor([number for number in range(size) if number not in special])
    if stretch < 2 or copies < 2 or rows < 1 or len(usable) < stretch:
        raise DataError(
            f"{rows} rows of {copies} times {stretch} distinct tokens were asked for; at least 1 row, 2 copies and 2 "
            f"tokens are needed, and no more tokens than the {len(usable)} ordinary ones of the vocabulary."
        )
    first = [] if lm.tokenizer.bos_id is None else [lm.tokenizer.bos_id]
    if prefix:  # an answer begins with its start token, a source with the source
        first = [lm.config.decoder_start_token_id] if prefix == "decoder." else []
    length, context = len(first) + stretch * copies, lm.config.max_position_embeddings
    if length > context:
        raise DataError(f"{copies} times {stretch} tokens make {length}; the model's context has {context}.")
    random = torch.Generator().manual_seed(seed)
    drawn = [usable[torch.randperm(len(usable), generator=random)[:stretch]].repeat(copies) for _ in range(rows)]
    bos_R = torch.tensor([first] * rows, dtype=torch.long)
    return Repeats(torch.cat((bos_R, torch.stack(drawn)), dim=1), stretch, len(first))


@torch.no_grad()
def head_scores(lm: LanguageModel, repeats: Repeats, layers: list[LayerHeads] | None = None) -> HeadScores:
    """The scores of every head. layers: their weights, where they are known already.

    Decoders and encoders; of a model that is no model of the next token there is no copying and no loss. Patterns are
    reduced to scores layer by layer.
    """
    model = lm.model
    causal, prefix = isinstance(model, CausalLM), getattr(model, "stack", "")
    tokens_RL = repeats.tokens_RL.to(model.device)
    found: dict[str, list[Tensor]] = {}
    taps: dict[str, Callable[[Tensor], None]] = {}
    folded_VD = unembedding(model) if causal else torch.empty(0)
    stretch_RS = tokens_RL[:, repeats.begins : repeats.begins + repeats.stretch]
    for number, layer in enumerate((layers or head_weights(model)) if causal else []):
        taps[f"{prefix}layers.{number}.attn.v"] = _copies_to(found, layer, folded_VD, stretch_RS, repeats)
    for number in range(lm.config.num_hidden_layers):
        taps[f"{prefix}layers.{number}.attn.probs"] = _patterns_to(found, repeats)
    with intervene(model, taps):
        h_RLD = model.hidden(tokens_RL)
    check_numbers(h_RLD, "the last layer's stream")
    loss_L = torch.empty(0)
    if isinstance(model, CausalLM):
        flat = surprisal(model, h_RLD[:, :-1].flatten(0, 1), tokens_RL[:, 1:].flatten())
        loss_L = F.pad(flat.view(len(tokens_RL), -1).mean(0).float().cpu(), (1, 0), value=float("nan"))
    return HeadScores({name: torch.stack(rows) for name, rows in found.items()}, loss_L, repeats)


def pattern_scores(probs_RNLS: Tensor, repeats: Repeats) -> dict[str, Tensor]:
    """{name: N} of one layer's patterns on such rows."""
    begins, stretch, copies = repeats.begins, repeats.stretch, repeats.copies
    probs = probs_RNLS.float()
    later = probs[:, :, begins + stretch :]  # queries of the second copy and those after it

    def at(distance: int) -> Tensor:
        """Mean over those queries of their attention so far back, in every earlier copy."""
        total_N = probs.new_zeros(probs.shape[1])
        for copy in range(1, copies):
            # Queries of copy c have their counterparts 1 ... c stretches before.
            diagonal = probs.diagonal(-(distance + (copy - 1) * stretch), -2, -1)  # starts at the query of that number
            start = begins + copy * stretch - (distance + (copy - 1) * stretch)
            total_N += diagonal[..., start:].sum((0, 2))
        return total_N / (later.shape[0] * later.shape[2])

    return {
        "induction": at(stretch - 1),
        "previous token": probs.diagonal(-1, -2, -1).mean((0, 2)),
        "duplicate token": at(stretch),
        "first token": later[..., 0].mean((0, 2)),
    }


def _patterns_to(found: dict[str, list[Tensor]], repeats: Repeats) -> Callable[[Tensor], None]:
    def tap(probs_RNLS: Tensor) -> None:
        for name, scores_N in pattern_scores(probs_RNLS, repeats).items():
            found.setdefault(name, []).append(scores_N.cpu())

    return tap


def _copies_to(
    found: dict[str, list[Tensor]], layer: LayerHeads, unembedding_VD: Tensor, stretch_RS: Tensor, repeats: Repeats
) -> Callable[[Tensor], None]:
    def tap(v_RLKH: Tensor) -> None:
        first = slice(repeats.begins, repeats.begins + repeats.stretch)
        v_RSNH = v_RLKH[:, first, list(layer.key_value_head)].float()
        # What head n at token s, carried to the stream and read out for the tokens t of the stretch.
        out_RTNH = torch.einsum("rtd,ndh->rtnh", unembedding_VD[stretch_RS], layer.o_NDH)
        added_RNST = torch.einsum("rsnh,rtnh->rnst", v_RSNH, out_RTNH)
        risen = (added_RNST - added_RNST.mean(-1, keepdim=True)).relu()
        total_RN, even = risen.sum((-2, -1)), 1 / repeats.stretch
        own_RN = risen.diagonal(0, -2, -1).sum(-1)
        share_RN = torch.where(total_RN > 0, own_RN / total_RN, even)  # a head that adds nothing prefers nothing
        found.setdefault("copying", []).append(((share_RN.mean(0) - even) / (1 - even)).cpu())

    return tap


# ── ablation ────────────────────────────────────────────────────────────────────────────────────────────────────────


def without_head(layer: int, head: int, prefix: str = "") -> dict[str, Callable[[Tensor], Tensor]]:
    """For `intervene`: what the head carries becomes its mean over rows and positions, the same for every token.
    prefix: of the stack's sites. A head that is not there is a NoSuchSite where it is used."""
    tap: Callable[[Tensor], Tensor] = lambda z_RL1H: z_RL1H.mean((0, 1), keepdim=True).expand_as(z_RL1H)  # noqa: E731
    return {f"{prefix}layers.{layer}.attn.z[:, :, {head}]": tap}

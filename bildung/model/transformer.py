"""The Transformer: embed, a stack of blocks, a final norm; and the decoder-only language model made of it.

    tokens -> embed -> [ x + attn(norm(x)) -> x + mlp(norm(x)) ] × layers -> norm -> lm_head -> logits
                         resid_pre    resid_mid          resid_post

A block, with the places a norm may stand at, is in block.py. Module names are Llama's in Hugging Face's code; names.py
says how each family's file calls them. Site names are TransformerLens's.
"""

# B batch, L length, S cached + new length, D hidden_size, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.model.attention import Mask, Memory, Rotation, make_mask
from bildung.model.base import CausalLM, check_tokens
from bildung.model.block import Block
from bildung.model.config import ModelConfig
from bildung.model.kv_cache import KVCache
from bildung.model.layers import Embedding, norm_from
from bildung.model.linear import Dense, Linear
from bildung.model.positions import ADDED, AddedPositions, RotaryEmbedding, bias_from, padded_beyond
from bildung.model.taps import Taps

if TYPE_CHECKING:
    from bildung.model.virtual import Virtual


@dataclass(frozen=True)
class Reading:
    """How a stretch of tokens is read: their positions, and who may see whom (see CausalLM.forward)."""

    positions_BL: Tensor
    keep_BS: Tensor | None = None
    segments_BL: Tensor | None = None
    prefix_BS: Tensor | None = None
    kv_cache: KVCache | None = None
    past: int = 0


class Stack(nn.Module):
    """The blocks and the final norm, with the positions that act inside attention.

    Below it stands what turns tokens, or patches of an image, into vectors; above it what reads the result.
    """

    def add_blocks(self, config: ModelConfig, taps: Taps, prefix: str) -> None:
        """What a subclass's __init__ calls after it has made what stands below."""
        self.config, self.taps, self.prefix = config, taps, prefix
        self.embed_norm = norm_from(config) if config.embed_norm else None
        self.layers = nn.ModuleList(Block(config, taps, prefix, i) for i in range(config.num_hidden_layers))
        self.norm = norm_from(config) if config.final_norm else None
        rotated = config.rotary_dim or config.head_dim
        rope = config.positions == "rope"
        self.rotary = RotaryEmbedding(config.rope, rotated) if rope else None
        self.local_rotary = RotaryEmbedding(config.local_rope, rotated) if rope and config.local_rope else None
        self.bias = bias_from(config)
        self.norm_site = f"{prefix}norm"

    def run(self, x_BLD: Tensor, reading: Reading, memory: Memory | None = None) -> Tensor:
        """Vectors through all blocks and the final norm."""
        if self.embed_norm is not None:
            x_BLD = self.embed_norm(x_BLD)
        if self.config.embed_dropout:
            x_BLD = F.dropout(x_BLD, self.config.embed_dropout, self.training)
        masks, rotations = self._masks(x_BLD, reading), self._rotations(reading.positions_BL, x_BLD.dtype)
        for block, window in zip(self.layers, self.config.windows, strict=True):
            x_BLD = block(x_BLD, rotations[window], masks[window], reading.kv_cache, memory)
        h_BLD = self.final(x_BLD)
        dropout = self.config.final_dropout
        return F.dropout(h_BLD, dropout, self.training) if dropout else h_BLD

    def final(self, x_BLD: Tensor) -> Tensor:
        """The final norm, which post-norm models lack."""
        return self.taps(self.norm_site, x_BLD if self.norm is None else self.norm(x_BLD))

    def _masks(self, x_BLD: Tensor, reading: Reading) -> dict[int | None, Mask]:
        """A mask for every kind of layer: its window, and the bias on the scores that all layers share."""
        L, past = x_BLD.shape[1], reading.past
        bias = None
        if self.bias is not None:
            # Distances are counted in columns: within a row they are those of the positions.
            columns = torch.arange(past + L, device=x_BLD.device)[None]
            bias = self.bias(columns[:, past:], columns).to(x_BLD.dtype)
        return {
            window: make_mask(
                L,
                past,
                window,
                reading.keep_BS,
                reading.segments_BL,
                x_BLD.device,
                causal=self.config.causal,
                prefix_BS=reading.prefix_BS,
            )
            .with_bias(bias)
            .cut(x_BLD, past + L)
            for window in set(self.config.windows)
        }

    def _rotations(self, positions_BL: Tensor, dtype: torch.dtype) -> dict[int | None, Rotation | None]:
        if self.rotary is None:
            return dict.fromkeys(self.config.windows)
        everywhere = self.rotary(positions_BL, dtype)
        local = everywhere if self.local_rotary is None else self.local_rotary(positions_BL, dtype)
        return {window: everywhere if window is None else local for window in set(self.config.windows)}


class Backbone(Stack):
    """A stack over tokens: embeddings, the positions that are added to them, segment vectors (BERT).

    virtual: what every row reads before its first token (see virtual.py).
    """

    def __init__(self, config: ModelConfig, taps: Taps, prefix: str = "", embed_tokens: Embedding | None = None):
        super().__init__()
        self.embed_tokens = embed_tokens or Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = AddedPositions(config) if config.positions in ADDED else None
        self.token_types = Embedding(config.token_types, config.hidden_size) if config.token_types else None
        self.virtual: Virtual | None = None
        self.add_blocks(config, taps, prefix)
        self.embed_site, self.pos_site = f"{prefix}embed", f"{prefix}pos_embed"

    @property
    def ahead(self) -> int:
        """How many virtual tokens there are."""
        return 0 if self.virtual is None else self.virtual.length

    def vectors(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Token vectors, scaled where the family does; of any leading dimensions."""
        x_D: Tensor = self.embed_tokens(tokens).to(dtype)
        # As Gemma does, the factor is rounded to the type of the activations.
        return x_D if self.config.embed_scale == 1.0 else x_D * torch.tensor(self.config.embed_scale, dtype=dtype)

    def embed(self, tokens_BL: Tensor, positions_BL: Tensor, types_BL: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Token vectors, plus those of positions and segments."""
        x_BLD = self.taps(self.embed_site, self.vectors(tokens_BL, dtype))
        if self.token_types is not None:
            types_BL = torch.zeros_like(tokens_BL) if types_BL is None else types_BL
            x_BLD = x_BLD + self.token_types(types_BL).to(dtype)
        if self.embed_positions is not None:
            added = self.embed_positions(positions_BL, dtype)  # of one row where all have the same positions
            x_BLD = x_BLD + self.taps(self.pos_site, added.expand_as(x_BLD))
        return x_BLD

    def forward(
        self,
        tokens_BL: Tensor,
        dtype: torch.dtype,
        *,
        positions_BL: Tensor | None = None,
        keep_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        prefix_BL: Tensor | None = None,
        types_BL: Tensor | None = None,
        kv_cache: KVCache | None = None,
        memory: Memory | None = None,
        with_prompt: bool = False,
    ) -> Tensor:
        """States BLD after the final norm. with_prompt: those of a prompt that is read beside the tokens too, first."""
        L = check_tokens(tokens_BL)
        past = kv_cache.length if kv_cache is not None else 0
        keep_BS = keep_BL
        if kv_cache is not None:
            kv_cache.reserve(L, keep_BL, prefix_BL)
            keep_BS = None if kv_cache.all_kept else kv_cache.keep_BS
            if kv_cache.prefix_BS is not None and any(self.config.windows):  # else it is seen, being past
                prefix_BL = kv_cache.prefix_BS[:, : past + L]
        if positions_BL is None and keep_BL is not None and kv_cache is None:
            taken = self.virtual.length if self.virtual is not None else 0
            positions_BL = padded_beyond(self.config.max_position_embeddings - taken, keep_BL)
        if positions_BL is None:
            positions_BL = torch.arange(past, past + L, device=tokens_BL.device)[None]
        reading = Reading(positions_BL, keep_BS, segments_BL, prefix_BL, kv_cache, past)
        if kv_cache is not None and kv_cache.ahead != self.ahead:
            raise SettingsError(
                f"this KV cache has place for {kv_cache.ahead} virtual tokens and the model has {self.ahead}; "
                f"make a new one with model.kv_cache(...)."
            )
        if self.virtual is not None:
            reading = self.virtual.before(self, reading, dtype)
        self._say_place(past, L, keep_BL, kv_cache)
        x_BLD = self.embed(tokens_BL, reading.positions_BL, types_BL, dtype)
        beside = self.virtual is not None and self.virtual.beside(self)
        if self.virtual is not None and beside:
            x_BLD, reading = self.virtual.join(self, x_BLD, reading)
            self.taps.reads(self.prefix, 0, x_BLD.shape[1], reading.keep_BS)
        h_BLD = self.run(x_BLD, reading, memory)
        if kv_cache is not None:
            kv_cache.length += L
        return h_BLD[:, -L:] if beside and not with_prompt else h_BLD

    def _say_place(self, past: int, length: int, keep_BL: Tensor | None, kv_cache: KVCache | None) -> None:
        """Tell the taps which tokens this pass reads; virtual ones do not count."""
        if kv_cache is None:
            return self.taps.reads(self.prefix, past, length, keep_BL)
        keep_BS = None if kv_cache.all_kept else kv_cache.keep_BS[:, self.ahead : self.ahead + past + length]
        return self.taps.reads(self.prefix, past, length, keep_BS, kv_cache.prompt)


class Decoder(CausalLM):
    """A causal Transformer: `model(tokens_BL) -> logits_BLV`."""

    config: ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.model = Backbone(config, self.taps)
        self.kv_heads = config.num_key_value_heads  # that are here (train/tensor_parallel.py)
        # A tied unembedding is the same Parameter; it is saved once, under the embedding's name.
        tied = self.model.embed_tokens.weight if config.tie_word_embeddings else None
        head = tied if tied is not None else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.lm_head = Linear(Dense(head), bias=config.head_bias)
        self.sites = {**stack_sites(config), "logits": "B L V"}
        self.name_linears()

    def kv_cache(self, batch_size: int, max_length: int) -> KVCache:
        return KVCache(
            self.config, batch_size, max_length, self.dtype, self.device, self.model.ahead, heads=self.kv_heads
        )

    def hidden(
        self,
        tokens_BL: Tensor,
        *,
        positions_BL: Tensor | None = None,
        keep_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        prefix_BL: Tensor | None = None,
        kv_cache: Any = None,
    ) -> Tensor:
        return self.model(
            tokens_BL,
            self.dtype,
            positions_BL=positions_BL,
            keep_BL=keep_BL,
            segments_BL=segments_BL,
            prefix_BL=prefix_BL,
            kv_cache=kv_cache,
        )

    def final_norm(self, x_BLD: Tensor) -> Tensor:
        return self.model.final(x_BLD)

    def unembed(self, h_BLD: Tensor) -> Tensor:
        return self.taps("logits", logits_from(self.config, self.lm_head, h_BLD))


def logits_from(config: ModelConfig, lm_head: Callable[[Tensor], Tensor], h_BLD: Tensor) -> Tensor:
    """The unembedding with the family's scale before and soft-cap after it."""
    logits_BLV = lm_head(h_BLD if config.logit_scale == 1.0 else h_BLD * config.logit_scale)
    if config.logit_softcap is not None:
        logits_BLV = config.logit_softcap * torch.tanh(logits_BLV / config.logit_softcap)
    return logits_BLV


ATTENTION_SITES = {
    "q": "B L N H",
    "k": "B L K H",
    "v": "B L K H",
    "scores": "B N L S",
    "probs": "B N L S",
    "z": "B L N H",
    "result": "B L N D",
    "out": "B L D",
}


def stack_sites(config: ModelConfig, prefix: str = "") -> dict[str, str]:
    """The closed list of a stack's activation sites with their shapes, in forward order (see taps.py)."""
    per_layer = {"resid_pre": "B L D", **{f"attn.{word}": shape for word, shape in ATTENTION_SITES.items()}}
    per_layer["resid_mid"] = "B L D"
    if config.cross:
        per_layer |= {f"cross.{word}": shape for word, shape in ATTENTION_SITES.items()}
        per_layer |= {"cross.k": "B S K H", "cross.v": "B S K H", "resid_cross": "B L D"}
    if config.mlp:
        per_layer |= {"mlp.in": "B L D", "mlp.act": "B L F", "mlp.out": "B L D"}
    per_layer["resid_post"] = "B L D"
    sites = {f"{prefix}embed": "B L D"}
    if config.positions in ADDED:
        sites[f"{prefix}pos_embed"] = "B L D"
    for layer in range(config.num_hidden_layers):
        sites |= {f"{prefix}layers.{layer}.{word}": shape for word, shape in per_layer.items()}
    return {**sites, f"{prefix}norm": "B L D"}

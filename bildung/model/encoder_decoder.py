"""The encoder-decoder Transformer (Vaswani et al. 2017, arXiv 1706.03762; T5, BART, Marian).

    source -> encoder (sees all of the source) -> memory
    <start> target -> decoder (causal; each block also attends to the memory) -> logits of the next target token

`model.given(source)` is the decoder with its source in mind. It is a CausalLM, so that decoding, beam search, scoring
and the loss are the same code as for a decoder-only model.
"""

# B batch, S source length, L target length, D hidden_size, V vocabulary

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bildung.model.attention import Memory
from bildung.model.base import CausalLM, Model
from bildung.model.config import ModelConfig
from bildung.model.kv_cache import KVCache
from bildung.model.layers import Embedding
from bildung.model.linear import Dense, Linear
from bildung.model.transformer import Backbone, logits_from, stack_sites


class EncoderDecoder(Model):
    """`model(source_BS, target_BL) -> logits_BLV`; `model.given(source_BS)` for everything a causal model can do."""

    config: ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if config.encoder is None:
            raise ValueError("the config of an encoder-decoder holds the encoder's in `encoder`.")
        self.shared = Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Backbone(config.encoder, self.taps, "encoder.", self.shared)
        self.decoder = Backbone(config, self.taps, "decoder.", self.shared)
        tied = self.shared.weight if config.tie_word_embeddings else None
        head = tied if tied is not None else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.lm_head = Linear(Dense(head), bias=config.head_bias)
        encoder, decoder = stack_sites(config.encoder, "encoder."), stack_sites(config, "decoder.")
        self.sites = {**encoder, **decoder, "logits": "B L V"}
        self.name_linears()

    @property
    def embedding(self) -> nn.Module:
        return self.shared

    def encode(self, source_BS: Tensor, keep_BS: Tensor | None = None) -> Memory:
        """The encoder's states, to be looked at by the decoder. keep_BS: False marks padding."""
        return Memory(self.encoder(source_BS, self.dtype, keep_BL=keep_BS), keep_BS)

    def given(self, source_BS: Tensor, keep_BS: Tensor | None = None) -> Conditioned:
        """The decoder as a causal language model of the target, with this source in mind (one row per target row)."""
        return Conditioned(self, self.encode(source_BS, keep_BS))

    def forward(
        self,
        source_BS: Tensor,
        target_BL: Tensor,
        *,
        source_keep_BS: Tensor | None = None,
        keep_BL: Tensor | None = None,
    ) -> Tensor:
        """Logits_BLV of every next target token. The target begins with the start token (decoder_start_token_id)."""
        return self.given(source_BS, source_keep_BS)(target_BL, keep_BL=keep_BL)

    def unembed(self, h_BLD: Tensor) -> Tensor:
        """The decoder's final states -> logits."""
        return self.taps("logits", logits_from(self.config, self.lm_head, h_BLD))


class Conditioned(CausalLM):
    """A decoder that has read its source. Holds no weights of its own; made anew for every source."""

    config: ModelConfig

    def __init__(self, whole: EncoderDecoder, memory: Memory):
        nn.Module.__init__(self)
        # Seen by nobody's parameters(), state_dict() or train(): the weights belong to the whole.
        object.__setattr__(self, "whole", whole)
        self.config, self.taps, self.memory = whole.config, whole.taps, memory
        self.training = whole.training

    whole: EncoderDecoder

    @property
    def lm_head(self) -> Linear:
        """The whole's unembedding."""
        return self.whole.lm_head

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def linears(self) -> dict[str, Linear]:
        return self.whole.linears()

    def kv_cache(self, batch_size: int, max_length: int) -> KVCache:
        return KVCache(self.config, batch_size, max_length, self.dtype, self.device)

    def select(self, rows_B: Tensor) -> Conditioned:
        """The same decoder over other rows of the sources (beam search)."""
        keep_BS = None if self.memory.keep_BS is None else self.memory.keep_BS[rows_B]
        return Conditioned(self.whole, replace(self.memory, states_BSD=self.memory.states_BSD[rows_B], keep_BS=keep_BS))

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
        return self.whole.decoder(
            tokens_BL,
            self.dtype,
            positions_BL=positions_BL,
            keep_BL=keep_BL,
            segments_BL=segments_BL,
            prefix_BL=prefix_BL,
            kv_cache=kv_cache,
            memory=self.memory,
        )

    def final_norm(self, x_BLD: Tensor) -> Tensor:
        return self.whole.decoder.final(x_BLD)

    def unembed(self, h_BLD: Tensor) -> Tensor:
        return self.whole.unembed(h_BLD)

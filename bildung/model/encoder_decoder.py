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
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import DataError
from bildung.model.attention import Memory
from bildung.model.base import Conditioned, Model, can_look
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
        # A parameter, so that it is saved, loaded and moved like all numbers; `unembed` lets no gradient through to it.
        bias_1V = nn.Parameter(torch.zeros(1, config.vocab_size), requires_grad=False)
        self.final_logits_bias = bias_1V if config.logits_bias else None
        encoder, decoder = stack_sites(config.encoder, "encoder."), stack_sites(config, "decoder.")
        self.sites = {**encoder, **decoder, "logits": "B L V"}
        self.name_linears()

    @property
    def embedding(self) -> nn.Module:
        return self.shared

    def encode(self, source_BS: Tensor, keep_BS: Tensor | None = None) -> Memory:
        """The encoder's states, to be looked at by the decoder. keep_BS: False marks padding.

        Positions count the real tokens of a row, so padding on either side changes nothing. (transformers counts
        columns: BART answers a source differently when it is padded on the left.)
        Raises DataError for a row without any real token, whose attention would be 0/0.
        """
        positions_BS = None
        if keep_BS is not None:
            if can_look(keep_BS) and not bool(keep_BS.any(dim=1).all()):
                raise DataError("a source without a single real token was given; a decoder has nothing to look at.")
            positions_BS = (keep_BS.cumsum(dim=1) - 1).clamp(min=0)
        states_BSD = self.encoder(source_BS, self.dtype, positions_BL=positions_BS, keep_BL=keep_BS, with_prompt=True)
        if keep_BS is not None:  # a prompt is looked at as the source is
            keep_BS = F.pad(keep_BS, (states_BSD.shape[1] - source_BS.shape[1], 0), value=True)
        return Memory(states_BSD, keep_BS)

    def given(self, source_BS: Tensor, keep_BS: Tensor | None = None) -> Remembering:
        """The decoder as a causal language model of the target, with this source in mind (one row per target row)."""
        return Remembering(self, self.encode(source_BS, keep_BS))

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
        logits_BLV = logits_from(self.config, self.lm_head, h_BLD)
        if self.final_logits_bias is not None:
            logits_BLV = logits_BLV + self.final_logits_bias.detach()[0].to(logits_BLV.dtype)
        return self.taps("logits", logits_BLV)


class Remembering(Conditioned):
    """The decoder with what the encoder made of its source."""

    config: ModelConfig
    memory: Memory

    def kv_cache(self, batch_size: int, max_length: int) -> KVCache:
        return KVCache(self.config, batch_size, max_length, self.dtype, self.device, self.decoder.ahead)

    def select(self, rows_B: Tensor) -> Remembering:
        keep_BS = None if self.memory.keep_BS is None else self.memory.keep_BS[rows_B]
        return Remembering(self.whole, replace(self.memory, states_BSD=self.memory.states_BSD[rows_B], keep_BS=keep_BS))

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
        self.check_rows(tokens_BL, self.memory.states_BSD.shape[0])
        return self.decoder(
            tokens_BL,
            self.dtype,
            positions_BL=positions_BL,
            keep_BL=keep_BL,
            segments_BL=segments_BL,
            prefix_BL=prefix_BL,
            kv_cache=kv_cache,
            memory=self.memory,
        )

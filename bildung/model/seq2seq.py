"""Recurrent sequence-to-sequence models: one network reads the source, another says the target.

    source  ->  encoder, one RNN from each side  ->  states s_1 ... s_S
                                                       |  bridge: tanh(W [last forward; last backward])
    <start> target  ->  decoder (attention_decoder.py) ->  logits of the next target token

Without attention the bridge is all the decoder ever learns of the source: a vector of one size for sources of every
length (Sutskever et al. 2014, Cho et al. 2014). Attention lets it look at all s_i again at every step.

`model.given(source)` is the decoder with its source in mind, a CausalLM: decoding, beam search, scoring and the loss
are the same code as for every other model.
"""

# B batch, S source length, L target length, D hidden_size, E embedding size, M size of a source state

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import ConfigError, DataError, SettingsError
from bildung.model.alignment import Attention
from bildung.model.attention_decoder import AttentionDecoder, DecoderState, SourceStates, decoder_sites
from bildung.model.base import Conditioned, Model, check_tokens
from bildung.model.config import BaseConfig
from bildung.model.layers import Embedding
from bildung.model.linear import Dense, Linear, dense_linear
from bildung.model.recurrent import Cell, RecurrentLayer, draw, inner_sites
from bildung.model.rnn import UNLIMITED, locked_dropout
from bildung.model.sequences import Sequences, State


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(BaseConfig):
    """What a recurrent seq2seq model is made of; families/rnn_seq2seq.py says what each key means."""

    kind: Any = "seq2seq"
    max_position_embeddings: int = UNLIMITED
    cell: Cell
    embedding_size: int
    encoder_layers: int
    encoder_size: int
    attention: Attention
    attention_size: int
    input_feeding: bool = False
    dropout: float = 0.0
    weight_drop: float = 0.0
    forget_bias: float = 1.0
    decoder_start_token_id: int

    def __post_init__(self) -> None:
        for name in ("dropout", "weight_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} = {getattr(self, name)}; it must lie in [0, 1).")
        if self.attention == "dot" and self.memory_size != self.hidden_size:
            raise ConfigError(
                f"config.json: attention = 'dot' multiplies decoder states of size {self.hidden_size} with source "
                f"states of size {self.memory_size} (2 x encoder_size); make them equal, or use 'general'."
            )
        if self.input_feeding and self.attention == "none":
            raise ConfigError("config.json: input_feeding feeds back what attention found; attention is 'none'.")

    @property
    def memory_size(self) -> int:
        """M: forward and backward state side by side."""
        return 2 * self.encoder_size


class BidirectionalEncoder(nn.Module):
    """Layers of two RNNs, one from each side; each token's state knows the whole source."""

    def __init__(self, config: Seq2SeqConfig, taps: Any, embed_tokens: Embedding):
        super().__init__()
        self.config, self.taps, self.embed_tokens = config, taps, embed_tokens
        sizes = [config.embedding_size, *[config.memory_size] * (config.encoder_layers - 1)]

        def side(word: str, backward: bool) -> nn.ModuleList:
            return nn.ModuleList(
                RecurrentLayer(
                    config.cell,
                    size,
                    config.encoder_size,
                    taps,
                    f"encoder.layers.{number}.{word}",
                    weight_drop=config.weight_drop,
                    backward=backward,
                )
                for number, size in enumerate(sizes)
            )

        self.forward_layers, self.backward_layers = side("forward", False), side("backward", True)

    def forward(self, source_BS: Tensor, keep_BS: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, list[State]]:
        """(states_BSM, per layer its last states with both directions side by side)."""
        shape = (source_BS.shape[0], check_tokens(source_BS))
        if keep_BS is not None and not bool(keep_BS.any(dim=1).all()):
            raise DataError("a source without a single real token was given; a decoder has nothing to look at.")
        ahead, back = Sequences(shape, keep_BS), Sequences(shape, keep_BS, backward=True)
        x = self.taps("encoder.embed", self.embed_tokens(source_BS).to(dtype))
        last: list[State] = []
        for number, (forward, backward) in enumerate(zip(self.forward_layers, self.backward_layers, strict=True)):
            x = locked_dropout(x, self.config.dropout, self.training)
            zero = forward.zero_state(shape[0], x.dtype, x.device)  # type: ignore[operator]
            (one, one_end), (other, other_end) = forward(x, zero, ahead), backward(x, zero, back)
            last.append(tuple(torch.cat(pair, dim=-1) for pair in zip(one_end, other_end, strict=True)))
            x = self.taps(f"encoder.layers.{number}.resid_post", torch.cat((one, other), dim=-1))
        return x, last


class Seq2Seq(Model):
    """`model(source_BS, target_BL) -> logits_BLV`; `model.given(source_BS)` for everything a causal model can do."""

    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig):
        super().__init__(config)
        D, E, M = config.hidden_size, config.embedding_size, config.memory_size
        self.shared = Embedding(config.vocab_size, E)
        self.encoder = BidirectionalEncoder(config, self.taps, self.shared)
        words = ("h", "c") if config.cell == "lstm" else ("h",)
        self.bridge = nn.ModuleList(
            nn.ModuleDict({word: dense_linear(M, D, bias=True) for word in words})
            for _ in range(config.num_hidden_layers)
        )
        self.decoder = AttentionDecoder(config, self.taps, self.shared)
        tied = self.shared.weight if config.tie_word_embeddings else None
        head = tied if tied is not None else nn.Parameter(torch.empty(config.vocab_size, D))
        self.lm_head = Linear(Dense(head), bias=True)
        self.sites = {**encoder_sites(config), **decoder_sites(config), "logits": "B L V"}
        self.name_linears()

    @property
    def embedding(self) -> nn.Module:
        return self.shared

    def encode(self, source_BS: Tensor, keep_BS: Tensor | None = None) -> SourceStates:
        """What the decoder will know of the source. keep_BS: False marks padding, on either side.

        Raises DataError for a row without any real token.
        """
        states_BSM, last = self.encoder(source_BS, keep_BS, self.dtype)
        start: list[State] = []
        for number, bridge in enumerate(self.bridge):
            h_BM, *c_BM = last[min(number, len(last) - 1)]
            h_BD = torch.tanh(bridge["h"](h_BM))  # type: ignore[index]
            start.append((h_BD, bridge["c"](c_BM[0])) if c_BM else (h_BD,))  # type: ignore[index]
        keys_BSA = states_BSM if self.decoder.cross is None else self.decoder.cross.keys(states_BSM)
        return SourceStates(states_BSM, keys_BSA, tuple(start), keep_BS)

    def given(self, source_BS: Tensor, keep_BS: Tensor | None = None) -> Answering:
        """The decoder as a causal language model of the target, with this source in mind (one row per target row)."""
        return Answering(self, self.encode(source_BS, keep_BS))

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

    def unembed(self, h_BLE: Tensor) -> Tensor:
        """The decoder's output -> logits."""
        return self.taps("logits", self.lm_head(h_BLE))

    def draw(self, generator: torch.Generator) -> None:
        """Starting weights: embeddings N(0, initializer_range²), layers see recurrent.draw, other matrices Xavier's."""
        self.shared.weight.normal_(0.0, self.config.initializer_range, generator=generator)
        layers = [module for module in self.modules() if isinstance(module, RecurrentLayer)]
        for layer in layers:
            draw(layer, generator, forget_bias=self.config.forget_bias)
        drawn = {id(linear) for layer in layers for linear in (layer.input_proj, layer.recurrent_proj)}
        for name, linear in self.linears().items():
            if id(linear) not in drawn and not (name == "lm_head" and self.config.tie_word_embeddings):
                nn.init.xavier_uniform_(linear.base.dense(), generator=generator)


class Answering(Conditioned):
    """The decoder with the states of its source."""

    config: Seq2SeqConfig
    memory: SourceStates

    def kv_cache(self, batch_size: int, max_length: int) -> DecoderState:
        """The state before the first target token: the bridge's."""
        return self.decoder.new_state(self.memory, max_length)

    def select(self, rows_B: Tensor) -> Answering:
        return Answering(self.whole, self.memory.select(rows_B))

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
        """What `unembed` reads. positions_BL is not looked at. Raises SettingsError for segments and prefixes."""
        if segments_BL is not None or prefix_BL is not None:
            raise SettingsError("a recurrent decoder answers one source per row, from left to right.")
        sources = self.memory.states_BSM.shape[0]
        self.check_rows(tokens_BL, sources)
        state = self.kv_cache(sources, check_tokens(tokens_BL)) if kv_cache is None else kv_cache
        return self.decoder(tokens_BL, self.memory, state, keep_BL)


def encoder_sites(config: Seq2SeqConfig) -> dict[str, str]:
    """Sites of the encoder with their shapes, in forward order. K is encoder_size."""
    sites = {"encoder.embed": "B S E"}
    for number in range(config.encoder_layers):
        for side in ("forward", "backward"):
            for word, shape in inner_sites(config.cell).items():
                sites[f"encoder.layers.{number}.{side}.{word}"] = shape.replace("L", "S").replace("D", "K")
        sites[f"encoder.layers.{number}.resid_post"] = "B S M"
    return sites

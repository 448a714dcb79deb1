"""Recurrent language models: an RNN, LSTM or GRU that reads token after token and keeps one state of fixed size.

    tokens -> embed -> layer 0 -> layer 1 -> ... -> out_proj -> lm_head -> logits
                        ^ state    ^ state

Everything read so far has to fit into the state, so a token costs the same however long the text is, in time and in
memory; a Transformer looks back at every token instead. What is far away is reached through as many steps as there are
tokens between, which is where gradients vanish or explode (train/bptt.py).

The stream has the names of a Transformer's, so that lenses and taps work: `resid_post` of a layer is the h of all its
tokens on the way up (changing it does not change what the layer itself remembers; its site `state` does).

Dropout is "locked" (Gal & Ghahramani 2016; Merity et al. 2017): one mask for all tokens of a row.
"""

# B batch, L length, D hidden_size, E embedding size, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import ConfigError, SettingsError
from bildung.model.base import CausalLM, check_tokens
from bildung.model.config import BaseConfig
from bildung.model.layers import Embedding
from bildung.model.linear import Dense, Linear, dense_linear
from bildung.model.recurrent import Act, Cell, RecurrentLayer, draw, inner_sites
from bildung.model.sequences import Sequences, State

UNLIMITED = 2**31 - 1  # a state has no last position


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(BaseConfig):
    """What a recurrent language model is made of; families/rnn.py says what each key means."""

    kind: Any = "recurrent"
    max_position_embeddings: int = UNLIMITED
    cell: Cell
    embedding_size: int
    hidden_act: Act = "tanh"
    embed_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    weight_drop: float = 0.0
    embed_scale: float = 1.0
    recurrent_scale: float = 1.0
    forget_bias: float = 1.0

    def __post_init__(self) -> None:
        for name in ("embed_dropout", "hidden_dropout", "output_dropout", "weight_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} = {getattr(self, name)}; it must lie in [0, 1).")
        if self.recurrent_scale <= 0:
            raise ConfigError(f"config.json: recurrent_scale = {self.recurrent_scale}; it must be above 0.")


class RecurrentState:
    """What a recurrent model remembers: h, and an LSTM's c, of every layer. Its size does not grow with the text."""

    def __init__(self, layers: list[State], max_length: int):
        self.layers, self.max_length = layers, max_length
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(one.nbytes for layer in self.layers for one in layer)

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order, repeated or left out (beam search)."""
        self.layers = [tuple(one_BD.index_select(0, rows_B) for one_BD in layer) for layer in self.layers]

    def detach(self) -> None:
        """Forget how the state came about: gradients stop here (truncated back-propagation through time)."""
        self.layers = [tuple(one_BD.detach() for one_BD in layer) for layer in self.layers]


class RecurrentBackbone(nn.Module):
    """Embedding, layers, and a projection to the size of a tied embedding."""

    def __init__(self, config: RecurrentConfig, taps: Any):
        super().__init__()
        D, E = config.hidden_size, config.embedding_size
        self.embed_tokens = Embedding(config.vocab_size, E)
        self.layers = nn.ModuleList(
            RecurrentLayer(
                config.cell,
                E if number == 0 else D,
                D,
                taps,
                f"layers.{number}",
                act=config.hidden_act,
                weight_drop=config.weight_drop,
            )
            for number in range(config.num_hidden_layers)
        )
        # A tied unembedding has rows of size E; without this matrix h could not be compared with them.
        self.out_proj = dense_linear(D, E) if config.tie_word_embeddings and D != E else None


class RecurrentLM(CausalLM):
    """A recurrent language model: `model(tokens_BL) -> logits_BLV`."""

    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.model = RecurrentBackbone(config, self.taps)
        size = self.model.embed_tokens.weight
        tied = size if config.tie_word_embeddings else None
        head = tied if tied is not None else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.lm_head = Linear(Dense(head), bias=True)
        self.sites = recurrent_sites(config)
        self.name_linears()

    def kv_cache(self, batch_size: int, max_length: int) -> RecurrentState:
        """The state before the first token. max_length limits nothing: no token takes room."""
        layers = [layer.zero_state(batch_size, self.dtype, self.device) for layer in self.model.layers]  # type: ignore[operator]
        return RecurrentState(layers, max_length)

    def hidden(
        self,
        tokens_BL: Tensor,
        *,
        positions_BL: Tensor | None = None,
        keep_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        prefix_BL: Tensor | None = None,
        kv_cache: RecurrentState | None = None,
    ) -> Tensor:
        """What `unembed` reads. positions_BL is not looked at: the order of the tokens is all a state knows.

        Padding leaves the state as it is; where the segment changes it starts at zero again, except that the first
        segment of a row goes on from `kv_cache`. Raises SettingsError for prefix_BL: nothing here sees ahead.
        """
        if prefix_BL is not None:
            raise SettingsError("a recurrent model reads from left to right; a prefix that sees ahead is not possible.")
        L = check_tokens(tokens_BL)
        state = self.kv_cache(tokens_BL.shape[0], L) if kv_cache is None else kv_cache
        sequences = Sequences((tokens_BL.shape[0], L), keep_BL, segments_BL)
        config = self.config
        self.taps.reads("", state.length, L, None if state.length else keep_BL)
        x = self.taps("embed", config.embed_scale * self.model.embed_tokens(tokens_BL).to(self.dtype))
        x = locked_dropout(x, config.embed_dropout, self.training)
        after: list[State] = []
        for number, layer in enumerate(self.model.layers):
            if number:
                x = locked_dropout(x, config.hidden_dropout, self.training)
            x = self.taps(f"layers.{number}.resid_pre", x)
            x, end = layer(x, state.layers[number], sequences)
            after.append(end)
            x = self.taps(f"layers.{number}.resid_post", x)
        state.layers, state.length = after, state.length + L
        return self.final_norm(locked_dropout(x, config.output_dropout, self.training))

    def final_norm(self, x_BLD: Tensor) -> Tensor:
        """There is no norm: the step from the last layer to the unembedding is the projection, if there is one."""
        return self.taps("norm", x_BLD if self.model.out_proj is None else self.model.out_proj(x_BLD))

    def unembed(self, h_BLE: Tensor) -> Tensor:
        """States after the projection -> logits (any leading dimensions)."""
        return self.taps("logits", self.lm_head(h_BLE))

    def draw(self, generator: torch.Generator) -> None:
        """Starting weights: embeddings N(0, initializer_range²), layers see recurrent.draw, other matrices Xavier's."""
        config = self.config
        self.model.embed_tokens.weight.normal_(0.0, config.initializer_range, generator=generator)
        for layer in self.model.layers:
            draw(layer, generator, scale=config.recurrent_scale, forget_bias=config.forget_bias)  # type: ignore[arg-type]
        if self.model.out_proj is not None:
            nn.init.xavier_uniform_(self.model.out_proj.base.dense(), generator=generator)
        if not config.tie_word_embeddings:
            nn.init.xavier_uniform_(self.lm_head.base.dense(), generator=generator)


def locked_dropout(x_BLD: Tensor, share: float, training: bool) -> Tensor:
    """Dropout with one mask for all tokens of a row (Gal & Ghahramani 2016, arXiv 1512.05287)."""
    if not (training and share):
        return x_BLD
    mask_B1D = nn.functional.dropout(torch.ones_like(x_BLD[:, :1]), share)
    return x_BLD * mask_B1D


def recurrent_sites(config: RecurrentConfig) -> dict[str, str]:
    """The closed list of activation sites with their shapes, in forward order."""
    sites = {"embed": "B L E"}
    for number in range(config.num_hidden_layers):
        inner = {f"layers.{number}.{word}": shape for word, shape in inner_sites(config.cell).items()}
        sites |= {f"layers.{number}.resid_pre": "B L D" if number else "B L E", **inner}
        sites[f"layers.{number}.resid_post"] = "B L D"
    return {**sites, "norm": "B L E" if config.tie_word_embeddings else "B L D", "logits": "B L V"}

"""The decoder of a recurrent seq2seq model: it says the target, token by token, looking at the source's states.

    none       only its first state knows the source
    luong      h_t = rnn(y_t, h_{t-1});                c_t = attention(h_t);      out_t = tanh(W_c [c_t; h_t])
    bahdanau   c_t = attention(h_{t-1});               h_t = rnn([y_t; c_t], h_{t-1});   out_t as above
    + input feeding: out_{t-1} is also part of what rnn reads at t, so it knows where it has looked (Luong, 3.3)

Without input feeding, Luong's decoder does not depend on its own attention: in training all steps run on the kernel and
then attend at once. Otherwise one step follows the other.
"""

# B batch, L target length, S source length, D decoder's size, E embedding size, M size of a source state

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bildung.model.alignment import Alignment
from bildung.model.layers import Embedding
from bildung.model.linear import dense_linear
from bildung.model.recurrent import RecurrentLayer, StepTaps, inner_sites
from bildung.model.rnn import RecurrentState, locked_dropout
from bildung.model.sequences import Sequences, State

if TYPE_CHECKING:
    from bildung.model.seq2seq import Seq2SeqConfig


@dataclass(frozen=True)
class SourceStates:
    """What the decoder knows of a source: the encoder's states, their keys, its own first states. keep_BS: False marks
    padding."""

    states_BSM: Tensor
    keys_BSA: Tensor
    start: tuple[State, ...]
    keep_BS: Tensor | None = None

    def select(self, rows_B: Tensor) -> SourceStates:
        """Those of other rows of the batch."""
        return replace(
            self,
            states_BSM=self.states_BSM[rows_B],
            keys_BSA=self.keys_BSA[rows_B],
            start=tuple(tuple(one_BD[rows_B] for one_BD in layer) for layer in self.start),
            keep_BS=None if self.keep_BS is None else self.keep_BS[rows_B],
        )


class DecoderState(RecurrentState):
    """A recurrent state, and the last output for input feeding."""

    def __init__(self, layers: list[State], max_length: int, fed_BD: Tensor):
        super().__init__(layers, max_length)
        self.fed_BD = fed_BD

    def select(self, rows_B: Tensor) -> None:
        super().select(rows_B)
        self.fed_BD = self.fed_BD.index_select(0, rows_B)

    def detach(self) -> None:
        super().detach()
        self.fed_BD = self.fed_BD.detach()


class AttentionDecoder(nn.Module):
    """Embedding (the encoder's too), recurrent layers, attention, and the output."""

    def __init__(self, config: Seq2SeqConfig, taps: Any, embed_tokens: Embedding):
        super().__init__()
        self.config, self.taps, self.embed_tokens = config, taps, embed_tokens
        D, E, M = config.hidden_size, config.embedding_size, config.memory_size
        self.before = config.attention == "bahdanau"
        read = E + (M if self.before else 0) + (D if config.input_feeding else 0)
        self.layers = nn.ModuleList(
            RecurrentLayer(
                config.cell, D if number else read, D, taps, f"decoder.layers.{number}", weight_drop=config.weight_drop
            )
            for number in range(config.num_hidden_layers)
        )
        attends = config.attention != "none"
        self.cross = Alignment(config.attention, D, M, config.attention_size) if attends else None
        self.combine = dense_linear(M + D, D, bias=True) if attends else None
        self.out_proj = dense_linear(D, E) if config.tie_word_embeddings and D != E else None

    def new_state(self, source: SourceStates, max_length: int) -> DecoderState:
        """The state before the first target token."""
        fed_BD = source.states_BSM.new_zeros(source.states_BSM.shape[0], self.config.hidden_size)
        return DecoderState(list(source.start), max_length, fed_BD)

    def forward(self, tokens_BL: Tensor, source: SourceStates, state: DecoderState, keep_BL: Tensor | None) -> Tensor:
        """What the unembedding reads (B, L, E); `state` is moved on, but not by padding (keep_BL False)."""
        x_BLE = self.embed_tokens(tokens_BL).to(source.states_BSM.dtype)
        x_BLE = self._drop(self.taps("decoder.embed", x_BLE))
        stepwise = self.before or self.config.input_feeding
        out_BLD = (self._by_steps if stepwise else self._at_once)(x_BLE, source, state, keep_BL)
        state.length += tokens_BL.shape[1]
        return self.final(self._drop(out_BLD))

    def final(self, out_BLD: Tensor) -> Tensor:
        """The projection to the size of a tied embedding, if there is one."""
        return self.taps("decoder.norm", out_BLD if self.out_proj is None else self.out_proj(out_BLD))

    def _at_once(self, x: Tensor, source: SourceStates, state: DecoderState, keep_BL: Tensor | None) -> Tensor:
        sequences = Sequences((x.shape[0], x.shape[1]), keep_BL)
        after = []
        for number, layer in enumerate(self.layers):
            x = self.taps(f"decoder.layers.{number}.resid_pre", self._drop(x) if number else x)
            x, end = layer(x, state.layers[number], sequences)
            after.append(end)
            x = self.taps(f"decoder.layers.{number}.resid_post", x)
        state.layers = after
        if self.cross is None or self.combine is None:
            return x
        tap = lambda word, y: self.taps(f"decoder.cross.{word}", y)  # noqa: E731
        context_BLM = self.cross(x, source.keys_BSA, source.states_BSM, source.keep_BS, tap)
        return torch.tanh(self.combine(torch.cat((context_BLM, x), dim=-1)))

    def _by_steps(self, x_BLE: Tensor, source: SourceStates, state: DecoderState, keep_BL: Tensor | None) -> Tensor:
        config = self.config
        history = StepTaps(self.taps, "decoder", Sequences((x_BLE.shape[0], x_BLE.shape[1])))
        steppers = [layer.stepper() for layer in self.layers]  # type: ignore[operator]
        # One dropout mask for all steps, as `locked_dropout` draws it.
        masks = [self._drop(torch.ones_like(state.fed_BD)[:, None])[:, 0] for _ in self.layers]
        outputs = []
        for step, x_BE in enumerate(x_BLE.unbind(1)):
            tap, old = history.under("decoder.cross", step), (state.layers, state.fed_BD)
            read = [x_BE]
            context_BM = x_BE.new_empty(0)
            if self.before:
                context_BM = self._look(old[0][-1][0], source, tap)
                read.append(context_BM)
            if config.input_feeding:
                read.append(state.fed_BD)
            x = torch.cat(read, dim=-1)
            layers: list[State] = []
            for number, stepper in enumerate(steppers):
                x = x * masks[number] if number else x
                site = history.at(step)
                x = site(f"layers.{number}.resid_pre", x)
                inner = lambda word, y, number=number, site=site: site(f"layers.{number}.{word}", y)  # noqa: E731
                layers.append(stepper(x, old[0][number], inner))
                x = site(f"layers.{number}.resid_post", layers[-1][0])
            if not self.before and self.cross is not None:
                context_BM = self._look(x, source, tap)
            out_BD = x if self.combine is None else torch.tanh(self.combine(torch.cat((context_BM, x), dim=-1)))
            outputs.append(out_BD)
            state.layers, state.fed_BD = layers, out_BD
            if keep_BL is not None:
                kept_B1 = keep_BL[:, step, None]
                state.fed_BD = torch.where(kept_B1, out_BD, old[1])
                state.layers = [
                    tuple(torch.where(kept_B1, new, before) for new, before in zip(*pair, strict=True))
                    for pair in zip(layers, old[0], strict=True)
                ]
        return torch.stack(outputs, dim=1)

    def _look(self, query_BD: Tensor, source: SourceStates, tap: Any) -> Tensor:
        """The context (B, M) of one step."""
        assert self.cross is not None
        found: Tensor = self.cross(query_BD[:, None], source.keys_BSA, source.states_BSM, source.keep_BS, tap)
        return found[:, 0]

    def _drop(self, x_BLD: Tensor) -> Tensor:
        return locked_dropout(x_BLD, self.config.dropout, self.training)


def decoder_sites(config: Seq2SeqConfig) -> dict[str, str]:
    """Sites of the decoder with their shapes, in forward order."""
    sites = {"decoder.embed": "B L E"}
    looks = {f"decoder.cross.{word}": f"B L {K}" for word, K in (("scores", "S"), ("probs", "S"), ("out", "M"))}
    if config.attention == "bahdanau":
        sites |= looks
    for number in range(config.num_hidden_layers):
        inner = {f"decoder.layers.{number}.{word}": shape for word, shape in inner_sites(config.cell).items()}
        stepwise = config.attention == "bahdanau" or config.input_feeding
        read = "B L R" if stepwise else "B L E"  # R: the embedding with the context and the output fed back
        sites |= {f"decoder.layers.{number}.resid_pre": "B L D" if number else read, **inner}
        sites[f"decoder.layers.{number}.resid_post"] = "B L D"
    if config.attention not in ("none", "bahdanau"):
        sites |= looks
    return {**sites, "decoder.norm": "B L E" if config.tie_word_embeddings else "B L D"}

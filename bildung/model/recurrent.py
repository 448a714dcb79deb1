"""Recurrent layers: the cells written out, and the same layer on torch's kernels.

    rnn    h = act(W_ih x + b + W_hh h)                       Elman 1990; act = identity is the linear RNN
    lstm   i, f, o = σ(...), g = tanh(...)                     Hochreiter & Schmidhuber 1997, forget gate: Gers 2000
           c = f c + i g,  h = o tanh(c)
    gru    r, z = σ(...),  n = tanh(W_in x + b_in + r (W_hn h + b_hn))        Cho et al. 2014
           h = (1 - z) n + z h                                 torch's form: r after the product, so b_hn is needed

`...` is W_ih x + b + W_hh h with one block of rows per gate, in the order above (i f g o; r z n), which is torch's.

A layer runs on a kernel unless somebody listens inside the recurrence (its sites gates, cell and state, or a recorder
on a matrix); then the loop over the steps is taken. Both give the same numbers to rounding. One token at a time takes
the loop's body too: a kernel would need the matrices dense, and quantized ones stay as they are.

The sites inside the recurrence have the shape of all others, B L K. A listener is called at every step, with what was
computed up to then (zeros beyond), and what it returns for the present step is what the next step reads. So the same
function that patches position 5 of a Transformer patches it here, and the recurrence goes on from the patch.
"""

# B batch, L length, E input size, D hidden_size, G gates * D, R rows at a step

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.model.linear import Linear, dense_linear
from bildung.model.sequences import Sequences, State
from bildung.model.taps import Taps

Cell = Literal["rnn", "lstm", "gru"]
Act = Literal["tanh", "relu", "identity"]
Tap = Callable[[str, Tensor], Tensor]

GATES = {"rnn": 1, "lstm": 4, "gru": 3}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "identity": lambda x: x}
KERNELS: dict[str, Any] = {
    "rnn tanh": torch.rnn_tanh,
    "rnn relu": torch.rnn_relu,
    "lstm tanh": torch.lstm,
    "gru tanh": torch.gru,
}


def rnn_step(input_RG: Tensor, recurrent_RG: Tensor, state: State, tap: Tap, act: Callable[[Tensor], Tensor]) -> State:
    """h = act(W_ih x + b + W_hh h)."""
    return (tap("state", act(input_RG + recurrent_RG)),)


def lstm_step(input_RG: Tensor, recurrent_RG: Tensor, state: State, tap: Tap) -> State:
    """The cell c is changed by sums and factors only: where f = 1, a gradient goes through it unchanged."""
    i, f, g, o = (input_RG + recurrent_RG).chunk(4, dim=-1)
    gates_RG = tap("gates", torch.cat((i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()), dim=-1))
    i, f, g, o = gates_RG.chunk(4, dim=-1)
    c_RD = tap("cell", f * state[1] + i * g)
    return tap("state", o * c_RD.tanh()), c_RD


def gru_step(input_RG: Tensor, recurrent_RG: Tensor, state: State, tap: Tap) -> State:
    """z = 1 keeps the state as it is."""
    (r, z, n), (r_h, z_h, n_h) = input_RG.chunk(3, dim=-1), recurrent_RG.chunk(3, dim=-1)
    r = (r + r_h).sigmoid()
    gates_RG = tap("gates", torch.cat((r, (z + z_h).sigmoid(), (n + r * n_h).tanh()), dim=-1))
    _, z, n = gates_RG.chunk(3, dim=-1)
    return (tap("state", (1 - z) * n + z * state[0]),)


class RecurrentLayer(nn.Module):
    """One layer in one direction.

    weight_drop: DropConnect on W_hh in training, one mask for all steps (Merity et al. 2017, arXiv 1708.02182).
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        size: int,
        taps: Taps,
        site: str,
        *,
        act: Act = "tanh",
        weight_drop: float = 0.0,
        backward: bool = False,
    ):
        super().__init__()
        self.cell, self.act, self.size = cell, act, size
        self.weight_drop, self.backward = weight_drop, backward
        self.input_proj = dense_linear(input_size, GATES[cell] * size, bias=True)
        # One bias is enough where W_ih x and W_hh h are only added.
        self.recurrent_proj = dense_linear(size, GATES[cell] * size, bias=cell == "gru")
        self.taps, self.site = taps, site
        self.inner_sites = tuple(f"{site}.{word}" for word in inner_sites(cell))

    def zero_state(self, rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """What a layer knows before its first token."""
        zeros = torch.zeros(rows, self.size, dtype=dtype, device=device)
        return (zeros, zeros) if self.cell == "lstm" else (zeros,)

    def forward(self, x_BLE: Tensor, state: State, sequences: Sequences) -> tuple[Tensor, State]:
        """(h_BLD of every token, the state of every row after its last token)."""
        if not sequences.sizes:  # nothing but padding; torch's kernels crash on it
            return x_BLE.new_zeros(*x_BLE.shape[:2], self.size), state
        start = sequences.start(state)
        run = self._kernel if self._fits_kernel(x_BLE) else self._loop
        h_BLD, end = run(x_BLE, start, sequences)
        return h_BLD, sequences.finish(state, end)

    def stepper(self) -> Callable[[Tensor, State, Tap], State]:
        """One token for each row, (x_RE, state, tap) -> state: for decoders whose next input depends on the state."""
        recurrent = self._recurrent()
        return lambda x_RE, state, tap: self._step(self.input_proj(x_RE), state, tap, recurrent)

    def _fits_kernel(self, x_BLE: Tensor) -> bool:
        if f"{self.cell} {self.act}" not in KERNELS or self.taps.wanted(*self.inner_sites):
            return False
        if x_BLE.shape[1] == 1 and not torch.is_grad_enabled():
            return False
        return not any(self._needs_its_input(linear) for linear in (self.input_proj, self.recurrent_proj))

    def _needs_its_input(self, linear: Linear) -> bool:
        """Whether a matrix must see each x: somebody records it, or a delta drops parts of it."""
        dropping = any(getattr(delta, "dropout", 0.0) and self.training for delta in linear.enabled_deltas())
        return linear.recorder is not None or dropping

    def _kernel(self, x_BLE: Tensor, start: State, sequences: Sequences) -> tuple[Tensor, State]:
        """torch's kernel, on the effective weights: deltas and quantized stores included."""
        dtype = x_BLE.dtype
        (weight_GE, bias_G), (weight_GD, hidden_bias_G) = self.input_proj.effective(), self.recurrent_proj.effective()
        assert bias_G is not None
        weights = [weight_GE, self._dropped(weight_GD), bias_G]
        weights.append(torch.zeros_like(bias_G) if hidden_bias_G is None else hidden_bias_G)
        weights = [weight.to(dtype) for weight in weights]
        state = [one_QD[None].contiguous() for one_QD in start]
        settings = (weights, True, 1, 0.0, torch.is_grad_enabled(), False)  # biases, layers, dropout, train, both ways
        hx = state if self.cell == "lstm" else state[0]
        kernel = KERNELS[f"{self.cell} {self.act}"]
        if sequences.whole:
            x_BLE = x_BLE.flip(1) if self.backward else x_BLE
            h_BLD, *end = kernel(x_BLE, hx, *settings, True)
            h_BLD = h_BLD.flip(1) if self.backward else h_BLD
        else:
            h_ND, *end = kernel(sequences.pack(x_BLE), sequences.batch_sizes, hx, *settings)
            h_BLD = sequences.unpack(h_ND)
        return h_BLD, tuple(one[0] for one in end)

    def _loop(self, x_BLE: Tensor, state: State, sequences: Sequences) -> tuple[Tensor, State]:
        """The recurrence written out: one step after the other, the running sequences side by side."""
        recurrent, history = self._recurrent(), StepTaps(self.taps, self.site, sequences)
        outputs = []
        for number, input_RG in enumerate(sequences.steps(self.input_proj(x_BLE))):
            running = len(input_RG)  # the longest sequences stand first
            before = tuple(one[:running] for one in state)
            after = self._step(input_RG, before, history.at(number), recurrent)
            outputs.append(after[0])
            ended = running < len(state[0])
            pairs = zip(after, state, strict=True)
            state = tuple(torch.cat((new, old[running:])) if ended else new for new, old in pairs)
        return sequences.rows(outputs), state

    def _step(self, input_RG: Tensor, state: State, tap: Tap, recurrent: Callable[[Tensor], Tensor]) -> State:
        recurrent_RG = recurrent(state[0])
        if self.cell == "lstm":
            return lstm_step(input_RG, recurrent_RG, state, tap)
        if self.cell == "gru":
            return gru_step(input_RG, recurrent_RG, state, tap)
        return rnn_step(input_RG, recurrent_RG, state, tap, ACTS[self.act])

    def _recurrent(self) -> Callable[[Tensor], Tensor]:
        """h -> W_hh h (+ b_hh), with one weight-drop mask for as long as it is used."""
        if not (self.training and self.weight_drop):
            return self.recurrent_proj
        linear = self.recurrent_proj
        whole_GD, bias_G = linear.effective()
        weight_GD = self._dropped(whole_GD)

        def product(h_RD: Tensor) -> Tensor:
            y_RG = F.linear(h_RD, weight_GD.to(h_RD.dtype), None if bias_G is None else bias_G.to(h_RD.dtype))
            if linear.recorder is not None:
                linear.record(linear.recorder, h_RD, y_RG)
            return y_RG

        return product

    def _dropped(self, weight_GD: Tensor) -> Tensor:
        return F.dropout(weight_GD, self.weight_drop, self.training) if self.weight_drop else weight_GD


class StepTaps:
    """The sites inside a recurrence, as tensors of all tokens: see the top of this file."""

    def __init__(self, taps: Taps, site: str, sequences: Sequences):
        self.taps, self.site, self.sequences = taps, site, sequences
        self.so_far: dict[str, Tensor] = {}  # site -> (B * L, K)

    def at(self, step: int) -> Tap:
        """The function that a step calls with a word and its activation (rows at that step, K)."""
        return lambda word, x_RK: self._tap(f"{self.site}.{word}", step, x_RK)

    def under(self, site: str, step: int) -> Tap:
        """The same for activations of one column (B, 1, K) of another part of the model."""
        return lambda word, x_B1K: self._tap(f"{site}.{word}", step, x_B1K[:, 0])[:, None]

    def _tap(self, site: str, step: int, x_RK: Tensor) -> Tensor:
        if not self.taps.wanted(site):
            return x_RK
        B, L = self.sequences.B, self.sequences.L
        places_R = self.sequences.places(step).to(x_RK.device)
        so_far = self.so_far.get(site)
        so_far = x_RK.new_zeros(B * L, x_RK.shape[-1]) if so_far is None else so_far
        shown = so_far.index_copy(0, places_R, x_RK)
        x_RK = self.taps(site, shown.view(B, L, -1)).flatten(0, 1)[places_R]
        self.so_far[site] = so_far.index_copy(0, places_R, x_RK)
        return x_RK


def inner_sites(cell: Cell) -> dict[str, str]:
    """Sites inside the recurrence, with their shapes."""
    if cell == "rnn":
        return {"state": "B L D"}
    if cell == "gru":
        return {"gates": "B L 3D", "state": "B L D"}
    return {"gates": "B L 4D", "cell": "B L D", "state": "B L D"}


def draw(layer: RecurrentLayer, generator: torch.Generator, *, scale: float = 1.0, forget_bias: float = 1.0) -> None:
    """Starting weights: each gate's W_ih as Xavier's, its W_hh `scale` times an orthogonal matrix, biases 0.

    All eigenvalues of such a W_hh have the size `scale`: below 1 a linear RNN's gradient vanishes with distance, above
    1 it explodes. An LSTM's forget gate starts open, with the bias `forget_bias` (Jozefowicz et al. 2015).
    """
    for weight in layer.input_proj.base.dense().chunk(GATES[layer.cell]):
        nn.init.xavier_uniform_(weight, generator=generator)
    for weight in layer.recurrent_proj.base.dense().chunk(GATES[layer.cell]):
        nn.init.orthogonal_(weight, scale, generator=generator)
    for bias in (layer.input_proj.bias, layer.recurrent_proj.bias):
        if bias is not None:
            bias.zero_()
    if layer.cell == "lstm" and layer.input_proj.bias is not None:
        layer.input_proj.bias[layer.size : 2 * layer.size] = forget_bias

"""Back-propagation through time, written out for the linear RNN: what autograd does in every recurrent model.

    h_t = A h_{t-1} + B x_t + b        y_t = C h_t        L = ½ Σ_t |y_t - ŷ_t|²          ŷ: the targets

A state acts on the loss through its own output and through the next state, so its gradient is a recursion that runs
backwards (Werbos 1990):

    δ_t = dL/dh_t = Cᵀ(y_t - ŷ_t) + Aᵀ δ_{t+1}              δ after the last step = 0
    dL/dA = Σ_t δ_t h_{t-1}ᵀ      dL/dB = Σ_t δ_t x_tᵀ      dL/db = Σ_t δ_t      dL/dC = Σ_t (y_t - ŷ_t) h_tᵀ

What a loss at step t says about a state k steps before has been multiplied by Aᵀ k times. With a spectral radius below
1 it vanishes, above 1 it explodes (Bengio et al. 1994; Pascanu et al. 2013, arXiv 1211.5063): see
`bildung look gradient_distance`.

Truncated: the sequence is read in windows; states go on from one window to the next, δ does not (carry.py).
"""

# L steps, D state, I input, O output

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """Of the loss: with respect to each parameter, the first state, and every state (`states_LD`: δ_t)."""

    A_DD: Tensor
    B_DI: Tensor
    b_D: Tensor
    C_OD: Tensor
    start_D: Tensor
    states_LD: Tensor


def linear_rnn_gradients(
    A_DD: Tensor,
    B_DI: Tensor,
    b_D: Tensor,
    C_OD: Tensor,
    x_LI: Tensor,
    target_LO: Tensor,
    start_D: Tensor,
    *,
    window: int | None = None,
) -> tuple[Tensor, Gradients]:
    """(the loss, its gradients) by hand; nothing is recorded.

    window: truncated back-propagation, no gradient crosses the border between windows of so many steps; None: the
    whole sequence.
    """
    with torch.no_grad():
        h = [start_D]
        for x_I in x_LI:
            h.append(A_DD @ h[-1] + B_DI @ x_I + b_D)
        h_LD = torch.stack(h[1:])
        error_LO = h_LD @ C_OD.T - target_LO
        loss = error_LO.square().sum() / 2
        states_LD = torch.zeros_like(h_LD)
        later_D = torch.zeros_like(start_D)
        for t in reversed(range(len(x_LI))):
            if window is not None and (t + 1) % window == 0:
                later_D = torch.zeros_like(start_D)  # the next state belongs to another window
            states_LD[t] = C_OD.T @ error_LO[t] + A_DD.T @ later_D
            later_D = states_LD[t]
        before_LD = torch.stack(h[:-1])
        return loss, Gradients(
            A_DD=states_LD.T @ before_LD,
            B_DI=states_LD.T @ x_LI,
            b_D=states_LD.sum(0),
            C_OD=error_LO.T @ h_LD,
            start_D=A_DD.T @ states_LD[0],
            states_LD=states_LD,
        )

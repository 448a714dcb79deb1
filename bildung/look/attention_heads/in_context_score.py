"""The in-context-learning score (Olsson et al. 2022): how much better a model guesses late in a text than early.

    score = loss of the 500th token - loss of the 50th,  mean over texts, in contexts of 512 tokens

in nats; below 0, the lower the better. For a context of another length L the places are 500/512 and 50/512 of it.
"""

# R rows of text, L positions

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.look.by_position import BATCH_TOKENS
from bildung.model.base import CausalLM
from bildung.model.store import LanguageModel
from bildung.train.objectives import surprisal


@dataclass(frozen=True)
class InContext:
    """score: late loss - early loss, in nats. stderr: over the rows. early, late: which tokens, counted from 1."""

    score: float
    stderr: float
    early: int
    late: int
    early_loss: float
    late_loss: float
    rows: int


def in_context_score(lm: LanguageModel, tokens_RL: Tensor) -> InContext:
    """The score on rows of text of one length. Raises DataError for rows below 16 tokens or a model that does not
    continue text."""
    length = tokens_RL.shape[1]
    early, late = round(50 / 512 * length), round(500 / 512 * length)
    if early < 2 or late >= length:
        raise DataError(f"rows of {length} tokens are too short for an early and a late one; give 16 or more.")
    loss_RL = loss_by_position(lm, tokens_RL)
    early_R, late_R = loss_RL[:, early - 2], loss_RL[:, late - 2]  # column 0 is the loss of the second token
    gained_R = late_R - early_R
    stderr = float(gained_R.std() / len(gained_R) ** 0.5) if len(gained_R) > 1 else float("nan")
    return InContext(
        float(gained_R.mean()), stderr, early, late, float(early_R.mean()), float(late_R.mean()), len(gained_R)
    )


@torch.no_grad()
def loss_by_position(lm: LanguageModel, tokens_RL: Tensor) -> Tensor:
    """-log p of every token but the first from those before it, nats (R, L - 1), float32. Raises DataError."""
    model = lm.model
    if not isinstance(model, CausalLM):
        raise DataError(f"a {lm.config.model_type} of kind {lm.config.kind!r} does not continue text.")
    found = []
    for rows_RL in tokens_RL.split(max(1, BATCH_TOKENS // tokens_RL.shape[1])):
        rows_RL = rows_RL.to(model.device)
        h_RLD = model.hidden(rows_RL)[:, :-1]
        found.append(surprisal(model, h_RLD.flatten(0, 1), rows_RL[:, 1:].flatten()).view(len(rows_RL), -1).cpu())
    return torch.cat(found)

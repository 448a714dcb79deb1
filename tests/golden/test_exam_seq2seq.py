"""Exam row 1: the context vector of seq2seq attention, and what scaling the encoder's states does to it."""

from __future__ import annotations

import torch

from bildung.model.alignment import attend, context, multiplicative_scores

STATES = torch.tensor([[2.0, -1.0, 0.0], [-1.0, 2.0, 1.0], [1.0, 1.0, -1.0]])


def test_row_1_context_of_given_weights() -> None:
    torch.testing.assert_close(context(torch.tensor([[0.4, 0.3, 0.3]]), STATES), torch.tensor([[0.8, 0.5, 0.0]]))


def test_row_1_scaled_states_change_the_weights_and_the_direction_of_the_context() -> None:
    query = torch.tensor([[0.3, 0.7, -0.2]])

    def look(factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        weights = attend(multiplicative_scores(query, factor * STATES))
        return weights, context(weights, factor * STATES)

    (weights, one), (sharper, scaled) = look(1.0), look(3.0)
    assert sharper.max() > weights.max() + 0.05
    assert torch.cosine_similarity(one, scaled).item() < 0.99
    # With the weights held fixed only the length changes.
    torch.testing.assert_close(context(weights, 3.0 * STATES), 3.0 * one)

"""The watcher: says so once, and only when both losses say so."""

from __future__ import annotations

import pytest

from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import adamw
from bildung.train.overfitting import newly_overfitting, overfitting


def rows(held, trained):
    """A measurement every ten steps; `trained` are the means between them, with noise that cancels."""
    log = [{"step": 0, "held_out_loss": held[0]}]
    for number, (held_loss, loss) in enumerate(zip(held[1:], trained, strict=True)):
        for step in range(10):
            log.append({"step": number * 10 + step + 1, "loss": loss + (0.5 if step % 2 else -0.5)})
        log[-1]["held_out_loss"] = held_loss
    return log


@pytest.mark.parametrize(
    "held, trained, is_overfitting",
    [
        ([5, 4, 3, 3.1, 3.2, 3.3], [4, 3, 2, 1, 0.5], True),
        ([5, 4, 3, 3.1, 3.2, 2.9], [4, 3, 2, 1, 0.5], False),  # not three in a row
        ([5, 4, 3, 3.1, 3.2, 3.3], [4, 3, 3.1, 3.2, 3.3], False),  # both rise: too high a learning rate
        ([5, 4.9, 4.8, 4.7, 4.6, 4.5], [4, 3, 2, 1, 0.5], False),  # a gap alone
    ],
)
def test_training_loss_falls_while_held_out_loss_rises(held, trained, is_overfitting):
    assert (overfitting(rows(held, trained)) is not None) == is_overfitting


def test_the_sentence_names_steps_and_losses():
    said = overfitting(rows([5, 4, 3, 3.1, 3.2, 3.3], [4, 3, 2, 1, 0.5]))
    assert "since about step 20" in said and "from 3.000 to 3.300" in said and "fell from 2.000 to 0.500" in said
    assert "3.000 at step 20" in said


def test_it_is_said_once():
    log = rows([5, 4, 3, 3.1, 3.2, 3.3, 3.4], [4, 3, 2, 1, 0.5, 0.4])
    said = [end for end in range(1, len(log) + 1) if newly_overfitting(log[:end])]
    assert said == [51]


def test_a_run_on_two_batches_says_so_on_the_terminal(make_model, batch_at, capsys):
    """Random tokens: what is learned of them is learned by heart."""
    from functools import partial

    from bildung.train.fit import mean_loss

    model = make_model()
    evaluate = partial(mean_loss, objective=clm, batches=[batch_at(99)])
    fit(model, lambda n: batch_at(n % 2), clm, adamw(model, 3e-2), steps=20, evaluate=evaluate, evaluate_every=2)
    assert capsys.readouterr().err.count("overfitting since about step") == 1

"""Scheduled sampling: the decay, what is read, determinism, and the loss on the true targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bildung.core.errors import SettingsError
from bildung.data.examples import Example
from bildung.data.seq2seq import Seq2SeqBatch, Seq2SeqExample, pad_seq2seq
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.run.loop import decode
from bildung.train.fit import fit
from bildung.train.optim import adamw
from bildung.train.scheduled_sampling import Numbered, NumberedBatches, ScheduledSampling, mixed, true_share
from bildung.train.seq2seq import seq2seq

KEYS: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "bos_token_id": 0, "eos_token_id": 1}
KINDS = {
    "bahdanau": {"model_type": "rnn_seq2seq", "attention": "bahdanau", "initializer_range": 0.5},
    "general": {"model_type": "rnn_seq2seq", "initializer_range": 0.5},
    "transformer": {
        "model_type": "transformer",
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def model_of(kind: str, **changes: Any) -> Any:
    return build(from_dict({**KEYS, **KINDS[kind], **changes}), seed=3)


def batch() -> Seq2SeqBatch:
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 8, 3, 8):
        source, target = (torch.randint(2, 30, (length,), generator=draw).tolist() for _ in range(2))
        rows.append(Seq2SeqExample([*source, 1], Example([0, *target, 1], [False] + [True] * (length + 1))))
    return pad_seq2seq(rows, None)


def test_the_decays() -> None:
    assert [true_share("linear", step, 100, 0.25) for step in (0, 50, 75, 1000)] == [1.0, 0.5, 0.25, 0.25]
    sigmoid = [true_share("inverse_sigmoid", step, 100, 0.1) for step in range(0, 1001, 10)]
    assert sigmoid == sorted(sigmoid, reverse=True) and sigmoid[0] > 0.9 and sigmoid[-1] == 0.1
    assert abs(sigmoid[5] - 0.5) < 1e-9
    with pytest.raises(SettingsError, match="at least 2 steps"):
        ScheduledSampling("linear", 0)


@kinds
def test_a_share_of_one_is_teacher_forcing_and_of_zero_the_models_own_answer(kind: str) -> None:
    model, one = model_of(kind).eval(), batch()
    given = model.given(one.source_BS, one.source_keep_BS)
    assert torch.equal(mixed(given, one.target.tokens_BL, 1.0), one.target.tokens_BL)
    own = mixed(given, one.target.tokens_BL, 0.0)
    answers = decode(given, [[0]] * 4, new_tokens=own.shape[1] - 1)
    assert own[:, 1:].tolist() == [answer.tokens for answer in answers]
    assert torch.equal(own[:, 0], one.target.tokens_BL[:, 0])


@kinds
def test_the_share_is_kept_and_the_same_seed_reads_the_same(kind: str) -> None:
    model, one = model_of(kind, dropout=0.2).train(), batch()
    given = model.given(one.source_BS, one.source_keep_BS)
    true = torch.full((4, 200 if kind != "transformer" else 60), 29)  # a token the model hardly guesses
    torch.manual_seed(1)
    first = mixed(given, true, 0.7)
    torch.manual_seed(1)
    assert torch.equal(mixed(given, true, 0.7), first)
    assert not torch.equal(mixed(given, true, 0.7), first)
    assert model.training and given.training
    assert 0.5 < (first == 29).float().mean() < 0.9
    torch.manual_seed(1)
    drawn = mixed(given, true, 0.0, "sample")
    assert len(drawn[:, 1:].unique()) > 10


@kinds
def test_the_loss_is_that_of_the_true_targets_after_what_was_read(kind: str) -> None:
    model, one = model_of(kind).eval(), batch()
    objective = ScheduledSampling("linear", 100)
    assert torch.equal(objective(model, Numbered(one, 0)).total, seq2seq(model, one).total)
    assert torch.equal(objective(model, one).total, seq2seq(model, one).total)
    torch.manual_seed(5)
    found = objective(model, Numbered(one, 80))
    torch.manual_seed(5)
    read = mixed(model.given(one.source_BS, one.source_keep_BS), one.target.tokens_BL, 0.2)
    logits = model(one.source_BS, read, source_keep_BS=one.source_keep_BS)[:, :-1]
    mask = one.target.loss_mask_BL[:, 1:]
    want = torch.nn.functional.cross_entropy(logits[mask], one.target.tokens_BL[:, 1:][mask], reduction="sum")
    assert abs(found.total - want).item() < 1e-3 and found.count == one.num_targets
    assert not torch.equal(read, one.target.tokens_BL)


def test_training_is_a_function_of_the_seed() -> None:
    def train() -> list[torch.Tensor]:
        model = model_of("bahdanau", dropout=0.1)
        batches = NumberedBatches(lambda n: batch(), micro_steps=2)
        given = {"steps": 6, "micro_steps": 2, "clip": 1.0}
        history = fit(model, batches, ScheduledSampling("linear", 4, 0.5), adamw(model, 1e-2), **given)
        assert [round(row["true_share"], 2) for row in history.rows] == [1.0, 0.75, 0.5, 0.5, 0.5, 0.5]
        return list(model.parameters())

    assert all(torch.equal(one, other) for one, other in zip(train(), train(), strict=True))

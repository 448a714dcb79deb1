"""Pairs in batches, and references: packed equals padded, remembered equals computed, each sequence is its own."""

from __future__ import annotations

import copy

import pytest
import torch

from bildung.align.preference import Pairs, as_batch, frozen, policy_logprobs, remembered, without_delta
from bildung.data.batches import pad
from bildung.model.low_rank import LowRank
from bildung.train.objectives import token_logprobs
from bildung.tune.lora import Settings, add_lora


def logprob_by_hand(model, example) -> float:
    """Log-probability of an example's targets, one token after the other."""
    with torch.no_grad():
        logp_LV = model(torch.tensor([example.tokens])).log_softmax(-1)[0]
    return sum(
        float(logp_LV[place - 1, token])
        for place, (token, is_target) in enumerate(zip(example.tokens, example.loss_mask, strict=True))
        if is_target
    )


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_scores_each_sequence_as_if_it_were_alone(tiny_lm, examples, packed):
    answers = Pairs(examples, tiny_lm.tokenizer.pad_id, packed)([4, 0, 2])
    assert answers.batch.tokens_BL.shape[0] == (4 if packed else 6)
    order = [examples[i].chosen for i in (4, 0, 2)] + [examples[i].rejected for i in (4, 0, 2)]
    expected = torch.tensor([logprob_by_hand(tiny_lm.model, example) for example in order])
    with torch.no_grad():
        torch.testing.assert_close(policy_logprobs(tiny_lm.model, answers), expected, rtol=1e-5, atol=1e-4)
        padded = token_logprobs(tiny_lm.model, pad(order, tiny_lm.tokenizer.pad_id))
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-4)


def test_only_answers_with_their_end_are_targets_and_no_prompt(tiny_lm, examples):
    answers = as_batch([examples[0].chosen, examples[0].rejected], tiny_lm.tokenizer.pad_id)
    targets = answers.batch.tokens_BL[answers.batch.loss_mask_BL].tolist()
    texts = [tiny_lm.tokenizer.decode(targets[: targets.index(2) + 1]), tiny_lm.tokenizer.decode(targets)]
    assert {"Paris.<|im_end|>", "I do not know, ask somebody else.<|im_end|>"} >= {texts[0]}
    assert "France" not in texts[1] and texts[1].count("<|im_end|>") == 2
    assert answers.num_targets == len(targets) and answers.num_tokens == sum(
        len(side) for side in (examples[0].chosen, examples[0].rejected)
    )


def test_gradients_do_not_leak_between_packed_sequences(tiny_lm, pairs):
    answers = pairs([0, 1])
    embedded = []
    handle = tiny_lm.model.model.layers[0].register_forward_pre_hook(
        lambda module, args: embedded.append(args[0].requires_grad_()) or args[0].retain_grad()
    )
    policy_logprobs(tiny_lm.model, answers)[0].backward()
    handle.remove()
    touched_BL = embedded[0].grad.abs().sum(-1) > 0
    assert touched_BL.any()
    assert (answers.sequence_BL[touched_BL] == 0).all() and answers.batch.keep_BL[touched_BL].all()


def test_remembered_equals_computed_whatever_company_a_pair_was_in(tiny_lm, pairs):
    computed = frozen(copy.deepcopy(tiny_lm.model))
    pairs.remember(tiny_lm.model, computed, [[0, 1], [2, 3], [0, 4]])
    assert sorted(pairs.reference) == [0, 1, 2, 3, 4]
    answers = pairs([3, 0])
    torch.testing.assert_close(remembered(tiny_lm.model, answers), computed(tiny_lm.model, answers))
    assert remembered(tiny_lm.model, answers.to("cpu")).shape == (4,)
    with pytest.raises(LookupError, match="remember"):
        remembered(tiny_lm.model, pairs([5, 0]))


def test_each_pair_is_scored_by_the_reference_once(tiny_lm, pairs):
    scored = []

    def reference(model, answers):
        scored.append(answers)
        return frozen(model)(model, answers)

    pairs.remember(tiny_lm.model, reference, [[0, 1], [1, 0], [2, 0]])
    pairs.remember(tiny_lm.model, reference, [[2, 1]])
    assert len(scored) == 2


def test_the_reference_without_the_new_delta_keeps_the_older_ones(tiny_lm, pairs):
    for linear in tiny_lm.model.linears().values():
        linear.deltas["default"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
        torch.nn.init.normal_(linear.deltas["default"].lora_B)
    answers = pairs([0, 1])
    with torch.no_grad():
        tuned = policy_logprobs(tiny_lm.model, answers)
    add_lora(tiny_lm.model, Settings(data="none"), "dpo")
    for linear in tiny_lm.model.linears().values():
        if "dpo" in linear.deltas:
            torch.nn.init.normal_(linear.deltas["dpo"].lora_B)
    assert torch.equal(without_delta("dpo")(tiny_lm.model, answers), tuned)
    assert not torch.allclose(policy_logprobs(tiny_lm.model, answers), tuned)

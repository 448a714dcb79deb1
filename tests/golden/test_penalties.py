"""OpenAI's presence and frequency penalties, by hand: logit_j - c_j · frequency - [c_j > 0] · presence."""

from __future__ import annotations

import pytest
import torch

from bildung.model.store import LanguageModel
from bildung.run.beam import Beam
from bildung.run.decode import Sampling, apply
from bildung.run.write import write


def test_four_tokens_by_hand() -> None:
    """The prompt is token 3; the answer so far 2 2 1. At the first token there is no answer, and nothing changes."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    rules = Sampling(presence_penalty=0.5, frequency_penalty=0.25).rules()
    seen, answer = [3], [2, 2, 1]
    for expected in ([1, 2, 3, 4], [1, 2, 2.25, 4], [1, 2, 2, 4], [1, 1.25, 2, 4]):
        assert apply(rules, logits, [seen])[0].tolist() == expected
        seen = [*seen, *answer[:1]]
        answer = answer[1:]
    assert logits.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_large_presence_penalty_says_nothing_twice(tiny_lm: LanguageModel, beams: int) -> None:
    """Two prompts of different lengths, whose own tokens are free to come again."""
    prompts = [tiny_lm.tokenizer.encode(text) for text in ("one two", "one two three four five")]
    for penalty, different in ((0.0, False), (1e6, True)):
        found = write(
            tiny_lm.model,
            tiny_lm.tokenizer,
            prompts,
            24,
            sampling=Sampling(presence_penalty=penalty),
            beam=Beam(beams=beams),
        )
        answers = [one[0].tokens for one in found]
        assert all(len(set(answer)) == len(answer) for answer in answers) == different

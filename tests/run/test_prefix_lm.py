"""Writing with a prefix language model: the prompt is seen in both directions, with a cache and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bildung
from bildung.core.errors import SettingsError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.model.transformer import Decoder
from bildung.model.virtual import Prompt, add_virtual
from bildung.run.beam import Beam, beam_search
from bildung.run.chat import Conversation
from bildung.run.decode import Sampling
from bildung.run.loop import decode, decode_steps

PROMPTS = [[5, 17, 42, 8, 77, 3, 60], [9], [77, 3, 3, 60, 12, 99, 31, 4, 4]]
WORDS: dict[str, Any] = dict(vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=4)
WORDS |= dict(model_type="bildung", prefix_lm="text", max_position_embeddings=64, initializer_range=0.3)
KINDS: dict[str, dict[str, Any]] = {
    "rope": dict(num_key_value_heads=2),
    "window": dict(windows=[3, None, 2]),  # the prefix is seen from outside the window too
    "alibi": dict(positions="alibi"),
    "learned": dict(positions="learned", attention_softcap=5.0),
}


def model_of(kind: str, **changes: Any) -> Decoder:
    return build(from_dict({**WORDS, **KINDS[kind], **changes}), seed=2).eval()


def log_probs(model: Decoder, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of the answer's tokens, by one pass over prompt and answer; and of all tokens in their places."""
    whole = torch.tensor([[*prompt, *answer]])
    prefix_BL = torch.arange(whole.shape[1])[None] < len(prompt)
    with torch.no_grad():
        return model(whole, prefix_BL=prefix_BL)[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_plain_forward_pass(kind: str) -> None:
    model, causal = model_of(kind), model_of(kind, prefix_lm=None)
    for use_cache in (True, False):
        for prompt in PROMPTS:
            (answer,) = decode(model, [prompt], new_tokens=12, use_cache=use_cache)
            found_LV = log_probs(model, prompt, answer.tokens)
            assert found_LV.argmax(-1).tolist() == answer.tokens
            chosen = found_LV.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(answer.log_probs), chosen, atol=2e-4, rtol=0)
            (other,) = decode(causal, [prompt], new_tokens=12)
            assert len(prompt) == 1 or other.tokens != answer.tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_padded_batch_answers_as_each_prompt_alone(kind: str, use_cache: bool) -> None:
    model = model_of(kind)
    together = decode(model, PROMPTS, new_tokens=12, use_cache=use_cache)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert answer.tokens == decode(model, [prompt], new_tokens=12)[0].tokens


@pytest.mark.parametrize("kind", ["rope", "window"])
def test_beams_compare_what_the_plain_forward_pass_says(kind: str) -> None:
    model = model_of(kind)
    for prompt, found in zip(
        PROMPTS, beam_search(model, PROMPTS, new_tokens=5, beam=Beam(beams=3, n_best=3)), strict=True
    ):
        for one in found:
            total = log_probs(model, prompt, list(one.tokens)).gather(-1, torch.tensor(one.tokens)[:, None]).sum()
            assert one.log_prob == pytest.approx(float(total), abs=1e-3)


def test_with_virtual_tokens_before_the_prompt() -> None:
    model = model_of("rope")
    add_virtual(model, Prompt(torch.randn(3, 48, generator=torch.Generator().manual_seed(0))))
    runs = [decode(model, PROMPTS, new_tokens=8, use_cache=use_cache) for use_cache in (True, False)]
    assert [one.tokens for one in runs[0]] == [one.tokens for one in runs[1]]
    found_LV = log_probs(model, PROMPTS[0], runs[0][0].tokens)
    assert found_LV.argmax(-1).tolist() == runs[0][0].tokens


def test_a_prompt_cannot_go_on_from_a_part_of_itself() -> None:
    model = model_of("rope")
    cache = model.kv_cache(1, 30)
    list(decode_steps(model, [PROMPTS[0][:4]], new_tokens=1, kv_cache=cache))
    with pytest.raises(SettingsError, match="a prefix is read whole"):
        next(decode_steps(model, [PROMPTS[0]], new_tokens=1, kv_cache=cache))


def test_a_conversation_is_read_anew_in_each_turn(tiny_lm: LanguageModel) -> None:
    size = {"vocab_size": tiny_lm.config.vocab_size, "max_position_embeddings": 512}
    model = model_of("rope", **size)
    lm = LanguageModel(model, tiny_lm.tokenizer, model.config)
    conversation, history = Conversation(lm, 8, Sampling()), []
    for question in ("Hello there.", "What is the capital of France?", "And of Italy?"):
        history.append({"role": "user", "content": question})
        expected = bildung.generate(lm, history, new_tokens=8)
        assert "".join(conversation.ask(question)) == expected
        history.append({"role": "assistant", "content": expected})

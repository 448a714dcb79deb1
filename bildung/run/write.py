"""Whole answers to a batch of prompts, by greedy decoding, sampling or beam search.

`generate.stream` gives one answer as it comes; here all prompts go through the model together, and the texts are made
at the end. What a prompt gets does not depend on the others (a draw depends on the prompt's number in the list).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bildung.core.errors import SettingsError
from bildung.model.base import Model
from bildung.run.beam import Beam, beam_search
from bildung.run.decode import Sampling, only_known
from bildung.run.loop import decode
from bildung.run.sources import reading
from bildung.tokens.stream import StreamDecoder
from bildung.tokens.tokenizer import Tokenizer

CONTEXT_OF_TEXT = 8  # so many tokens of the prompt decide how the answer's first one is written


@dataclass(frozen=True)
class Written:
    """An answer. tokens: with the stop token, if one came. log_prob: of all tokens, in nats, under the distribution
    they were taken from. score: what beam search compared it by."""

    text: str
    tokens: tuple[int, ...]
    log_prob: float
    score: float | None = None


def write(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    sampling: Sampling | None = None,
    beam: Beam | None = None,
    stop: Sequence[str] = (),
) -> list[list[Written]]:
    """For each prompt of token ids its answers, the best first: the beam's `n_best`, or one without a beam. For a model
    that answers sources (see sources.py) the prompts are these.

    stop: a text ends before the first of these (beam search compares the answers before they are cut).
    Raises SettingsError for a beam together with sampling, and as `decode` and `beam_search`.
    """
    sampling = sampling or Sampling()
    model, prompts, own_rules = reading(model, prompts)
    rules, stop_ids = [*own_rules, *sampling.rules()], tokenizer.stop_ids
    if model.config.vocab_size > tokenizer.vocab_size:
        rules.append(only_known(tokenizer.vocab_size))
    found: list[list[Written]] = []
    if beam is None or beam == Beam():
        answers = decode(
            model, prompts, new_tokens=new_tokens, choose=sampling.choose(), rules=rules, stop_ids=stop_ids
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            text = answer_text(tokenizer, prompt, answer.tokens, stop)
            found.append([Written(text, tuple(answer.tokens), math.fsum(answer.log_probs))])
        return found
    if sampling.temperature != 0:
        raise SettingsError(
            f"temperature = {sampling.temperature} draws answers and a beam searches for the most probable one; leave "
            f"one of them out."
        )
    if beam.beams == 1 and replace(beam, n_best=1, no_repeat_ngram=0, min_tokens=0) != Beam():
        raise SettingsError(
            "length_penalty, length_norm and coverage_penalty do nothing with one beam, which follows the likeliest "
            "token; set beams, or leave them out."
        )
    searched = beam_search(model, prompts, new_tokens=new_tokens, beam=beam, rules=rules, stop_ids=stop_ids)
    for prompt, hypotheses in zip(prompts, searched, strict=True):
        texts = [answer_text(tokenizer, prompt, one.tokens, stop) for one in hypotheses]
        pairs = zip(texts, hypotheses, strict=True)
        found.append([Written(text, one.tokens, one.log_prob, one.score) for text, one in pairs])
    return found


def answer_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """What the tokens add to the prompt's text, without the stop token, up to the first of the stop strings."""
    decoder = StreamDecoder(tokenizer, skip_special=True)
    decoder.context = list(prompt[-CONTEXT_OF_TEXT:])
    spoken = [token for token in tokens if token not in tokenizer.stop_ids]
    text = "".join(map(decoder.push, spoken)) + decoder.flush()
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]

"""Models that answer a source instead of going on with a prompt: encoder-decoders and recurrent seq2seq models.

    causal model       prompt ids                              -> the answer goes on from the prompt
    encoder-decoder    source ids -> encoder -> given(source)  -> the answer goes on from the start token

`reading` makes one kind of the other, so that decoding, beam search and the writing of texts are the same code. Sources
of different lengths are padded, masked, and read together; an answer does not depend on the other sources.
"""

# B sources, S source length, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.model.base import CausalLM, Model
from bildung.run.decode import FORBIDDEN, Ids, LogitsRule


def answers_sources(model: Model) -> bool:
    """Whether the model reads a source (it has `given`) rather than a prompt."""
    return hasattr(model, "given")


def reading(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[CausalLM, list[list[int]], list[LogitsRule]]:
    """(a causal model, what each of its answers goes on from, rules for its logits).

    Of a causal model: itself and the prompts. Of one that answers sources, which the prompts then are: the model with
    the sources in mind, start tokens, and a rule against padding, which the start token often is and no answer holds.
    Raises DataError for an empty source or a token outside the vocabulary.
    """
    if not answers_sources(model):
        return model, [list(prompt) for prompt in prompts], []
    source_BS, keep_BS = pad_sources(prompts, model.config.vocab_size, model.device)
    was_training = model.training
    model.eval()  # the encoder reads without dropout
    try:
        with torch.inference_mode():
            conditioned = model.given(source_BS, keep_BS)
    finally:
        model.train(was_training)
    conditioned.training = was_training  # as its weights are: the decoding loop switches it off and on again
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    rules = [without(pad)] if pad is not None and pad not in model.config.eos_token_ids else []
    return conditioned, [[start] for _ in prompts], rules


def pad_sources(
    sources: Sequence[Sequence[int]], vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(source_BS, keep_BS), padded on the right; no mask when all sources have the same length."""
    if not sources or not all(len(source) for source in sources):
        raise DataError("an empty source was given; an encoder needs at least one token to read.")
    if wrong := [token for source in sources for token in source if not 0 <= token < vocab_size]:
        raise DataError(f"token {wrong[0]} is outside the model's vocabulary of {vocab_size}.")
    lengths = [len(source) for source in sources]
    longest = max(lengths)
    source_BS = torch.tensor([[*source, *[0] * (longest - len(source))] for source in sources], device=device)
    if min(lengths) == longest:
        return source_BS, None
    return source_BS, torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]


def without(token: int) -> LogitsRule:
    """Forbids one token."""

    def rule(logits_BV: Tensor, ids: Ids) -> Tensor:
        logits_BV = logits_BV.clone()
        logits_BV[:, token] = FORBIDDEN
        return logits_BV

    return rule

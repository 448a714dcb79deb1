"""The decoding loop over token ids: read the prompts once, then one token per row and step.

With a KV cache a step computes one position, and attention over T new tokens costs 1 + 2 + ... + T ~ T²; without one it
computes all positions again, and attention costs 1² + 2² + ... + T² ~ T³. The tokens are the same.

Prompts of different lengths are padded on the LEFT, so that all rows end, and go on, in the same column:

    . . a b c | x        the padding is masked out, and positions count from a row's own first token:
    d e f g h | y        a row's answer does not depend on the other rows
"""

# B batch, L length, V vocabulary

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import DataError, ModelFileError, SettingsError
from bildung.model.base import CausalLM
from bildung.model.kv_cache import KVCache
from bildung.model.packed import packed
from bildung.run.decode import Choose, LogitsRule, apply, greedy

WORTH_PACKING = 16  # so many steps gain what packing the matrices costs


@dataclass(frozen=True)
class Step:
    """One new token for each row. `running` is False for rows that had ended before: their token means nothing."""

    tokens: list[int]
    log_probs: list[float]
    running: list[bool]


@dataclass
class Answer:
    """What one row generated, a stop token at the end included.

    log_probs: of each token under the distribution it was taken from, after the rules; without rules, the model's own.
    ended: "stop" when a stop token came, "length" when `new_tokens` were reached.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: Literal["stop", "length"] = "length"


def decode(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    choose: Choose = greedy,
    rules: Sequence[LogitsRule] = (),
    stop_ids: Collection[int] = (),
    use_cache: bool = True,
) -> list[Answer]:
    """The answers to a batch of prompts (token ids, of any lengths). Raises as `decode_steps`."""
    answers = [Answer() for _ in prompts]
    for step in decode_steps(
        model, prompts, new_tokens=new_tokens, choose=choose, rules=rules, stop_ids=stop_ids, use_cache=use_cache
    ):
        for answer, token, log_prob, running in zip(answers, step.tokens, step.log_probs, step.running, strict=True):
            if running:
                answer.tokens.append(token)
                answer.log_probs.append(log_prob)
                answer.ended = "stop" if token in stop_ids else "length"
    return answers


# As a decorator, inference mode covers the loop's own work only; a `with` block in a generator leaks to the caller.
@torch.inference_mode()
def decode_steps(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    choose: Choose = greedy,
    rules: Sequence[LogitsRule] = (),
    stop_ids: Collection[int] = (),
    use_cache: bool = True,
    kv_cache: KVCache | None = None,
) -> Iterator[Step]:
    """Generates until every row has ended or has `new_tokens` tokens; yields after each token.

    kv_cache: one to go on with. It must hold exactly the first `kv_cache.length` tokens of each prompt (fewer than the
    prompt has); a step's token enters it with the next step. Only for prompts of one length.
    Raises SettingsError when prompt and answer exceed the model's context, DataError for an empty prompt or a token
    outside the vocabulary, ModelFileError when the model's logits are not numbers.
    """
    check(model, prompts, new_tokens)
    past = kv_cache.length if kv_cache is not None else 0
    tokens_BL, keep_BL = pad_left(prompts, model.device)
    prefix_BL = prefix_of(model, tokens_BL, keep_BL)
    if past and (keep_BL is not None or past >= tokens_BL.shape[1]):
        raise SettingsError(
            f"a cache of {past} tokens needs prompts of one length that go on from it; "
            f"these have {sorted({len(prompt) for prompt in prompts})} tokens."
        )
    if use_cache and kv_cache is None:
        kv_cache = model.kv_cache(len(prompts), tokens_BL.shape[1] + new_tokens - 1)
    ids = [list(prompt) for prompt in prompts]
    running = [True] * len(prompts)
    with working(model, pack=new_tokens >= WORTH_PACKING), model.taps.answering(tokens_BL.shape[1]):
        logits_BV = last_logits(model, tokens_BL[:, past:], keep_BL, positions_of(keep_BL), kv_cache, prefix_BL)
        for count in range(1, new_tokens + 1):
            logits_BV = apply(rules, logits_BV, ids)
            total_B = logits_BV.logsumexp(dim=-1)
            if not bool(total_B.isfinite().all()):
                raise ModelFileError(f"the model's logits are not finite numbers at new token {count}; it is damaged.")
            tokens_B = choose(logits_BV)
            log_probs_B = logits_BV.gather(-1, tokens_B[:, None])[:, 0] - total_B
            step = Step(tokens_B.tolist(), log_probs_B.tolist(), list(running))
            for row, token in enumerate(step.tokens):
                ids[row].append(token)
                running[row] = running[row] and token not in stop_ids
            yield step
            if count == new_tokens or not any(running):
                return
            if kv_cache is not None:
                positions_B1 = None if keep_BL is None else positions_of(keep_BL)[:, -1:] + count  # type: ignore[index]
                logits_BV = last_logits(model, tokens_B[:, None], None, positions_B1, kv_cache)
            else:
                tokens_BL = torch.cat((tokens_BL, tokens_B[:, None]), dim=1)
                if keep_BL is not None:
                    keep_BL = torch.cat((keep_BL, keep_BL.new_ones(len(prompts), 1)), dim=1)
                if prefix_BL is not None:
                    prefix_BL = F.pad(prefix_BL, (0, 1))
                logits_BV = last_logits(model, tokens_BL, keep_BL, positions_of(keep_BL), None, prefix_BL)


@contextmanager
def working(model: CausalLM, pack: bool) -> Iterator[None]:
    """The model in evaluation mode (no dropout in what is generated) and, if wanted, with packed matrices."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        if pack:
            with packed(model):
                yield
        else:
            yield
    finally:
        if was_training:
            model.train()


def last_logits(
    model: CausalLM,
    tokens_BL: Tensor,
    keep_BL: Tensor | None,
    positions_BL: Tensor | None,
    kv_cache: KVCache | None,
    prefix_BL: Tensor | None = None,
) -> Tensor:
    """Logits after the last token; the unembedding, a fifth of a small model's work, is done for that one only."""
    h_BLD = model.hidden(tokens_BL, keep_BL=keep_BL, positions_BL=positions_BL, prefix_BL=prefix_BL, kv_cache=kv_cache)
    return model.unembed(h_BLD[:, -1])


def prefix_of(model: CausalLM, tokens_BL: Tensor, keep_BL: Tensor | None) -> Tensor | None:
    """The whole prompt, for a model that reads it in both directions; None for all others."""
    if not model.prefix_lm:
        return None
    return torch.ones_like(tokens_BL, dtype=torch.bool) if keep_BL is None else keep_BL


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(tokens_BL, keep_BL), or no mask when all prompts have the same length. Padding is 0; only the mask tells."""
    longest = max(len(prompt) for prompt in prompts)
    tokens_BL = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return tokens_BL, None
    keep_BL = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    return tokens_BL, keep_BL


def positions_of(keep_BL: Tensor | None) -> Tensor | None:
    """0, 1, 2... from the first real token of each row."""
    return None if keep_BL is None else (keep_BL.cumsum(dim=1) - 1).clamp(min=0)


def check(model: CausalLM, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Raises SettingsError, DataError or ModelFileError when these prompts cannot be answered."""
    if not isinstance(model, CausalLM):
        raise ModelFileError(
            f"a {model.config.model_type} is of kind {model.config.kind!r}, which does not continue text; decoders and "
            f"recurrent models do, and encoder-decoders answer a text."
        )
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise SettingsError(f"new_tokens = {new_tokens!r}; it must be a whole number from 1.")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise DataError("an empty prompt was given; a model needs at least one token to go on from, e.g. BOS.")
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    if wrong := [token for prompt in prompts for token in prompt if not 0 <= token < vocabulary]:
        raise DataError(f"token {wrong[0]} is outside the model's vocabulary of {vocabulary}.")
    longest = max(len(prompt) for prompt in prompts)
    if longest + new_tokens > context:
        room = context - longest
        advice = f"ask for at most {room} new tokens" if room > 0 else f"shorten it to less than {context} tokens"
        raise SettingsError(
            f"a prompt of {longest} tokens and {new_tokens} new ones exceed the model's context of {context} "
            f"(max_position_embeddings); {advice}."
        )

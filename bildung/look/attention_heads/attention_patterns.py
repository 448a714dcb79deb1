"""Attention patterns: who looks at whom, in every head of every layer.

    probs[n, h, l, s]   how much head h of layer n, at position l, takes from position s; each row sums to 1

A pattern says where a head reads, not what it carries on (that is the OV circuit), and not that it matters.
"""

# N layers, H heads, L query positions, S key positions

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.look.asked import StackName, stack_in, stack_prefix
from bildung.look.lenses.lens import ANSWER
from bildung.look.prompt import check_same_model_shape, check_same_tokens, encode_prompt, label, text_in
from bildung.model.encoder_decoder import EncoderDecoder
from bildung.model.store import LanguageModel
from bildung.model.taps import observe

LONGEST = 512  # tokens: a pattern grows with the square


@dataclass
class AttentionPatterns:
    """All heads on one text."""

    tokens: list[int]
    labels: list[str]
    probs_NHLS: Tensor

    def scores(self) -> dict[str, Tensor]:
        """Numbers NH to sort heads by: mean attention to the token before, to the first token, to itself; entropy."""
        p, L = self.probs_NHLS, len(self.tokens)
        # Layer by layer: the logarithms of all would be as large as the patterns once more.
        entropy_NHL = torch.stack([-(one * one.clamp_min(1e-12).log()).sum(-1) for one in p])
        # The first query sees only itself, so it says nothing about a head.
        later = slice(1, None) if L > 1 else slice(None)
        return {
            "previous token": p.diagonal(-1, -2, -1).mean(-1) if L > 1 else torch.zeros(p.shape[:2]),
            "first token": p[:, :, later, 0].mean(-1),
            "same token": p.diagonal(0, -2, -1)[..., later].mean(-1),
            "entropy": entropy_NHL[..., later].mean(-1),
        }


@torch.no_grad()
def attention_patterns(
    lm: LanguageModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    chat: bool = False,
    max_tokens: int = LONGEST,
    stack: StackName = "encoder",
) -> AttentionPatterns:
    """The patterns of every head on a text or on token ids; plain, adapted, quantized and edited models alike.

    chat: the text is a user's turn. stack: of an encoder-decoder; its decoder reads its own answer to the prompt.
    Raises DataError for a prompt that is empty or longer than max_tokens, and where nothing attends to tokens.
    """
    return _patterns(*_reading(lm, prompt, chat, max_tokens, stack))


def _reading(
    lm: LanguageModel, prompt: str | Sequence[int] | Tensor, chat: bool, limit: int, stack: StackName
) -> tuple[LanguageModel, list[int]]:
    """(what attends to the tokens, the tokens)."""
    if isinstance(lm.model, EncoderDecoder) and stack == "encoder":
        return stack_in(lm, stack, ()), encode_prompt(lm, prompt, chat, limit)
    return text_in(lm, prompt, chat=chat, limit=limit, new_tokens=ANSWER)


def pattern_difference(
    a: LanguageModel,
    b: LanguageModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    chat: bool = False,
    max_tokens: int = LONGEST,
    stack: StackName = "encoder",
) -> tuple[AttentionPatterns, AttentionPatterns]:
    """Both models' patterns on the same token ids (with `chat`: those of A's template; of decoders that answer a
    source, of A's answer).

    Raises TokenizerError when their tokenizers disagree, DataError when they have other layers or heads.
    """
    ids = encode_prompt(a, prompt, chat, max_tokens)
    check_same_tokens(a, b, ids, prompt, chat)
    check_same_model_shape(a, b)
    one, read = _reading(a, ids, False, max_tokens, stack)
    return _patterns(one, read), _patterns(stack_in(b, stack, ids), read)


def pooled(values_NHLS: Tensor, side: int) -> Tensor:
    """Patterns in at most side x side points: each the value of largest size among the tokens it stands for."""
    if values_NHLS.shape[-1] <= side:
        return values_NHLS

    def shrink(values_HLS: Tensor) -> Tensor:
        high, low = (torch.nn.functional.adaptive_max_pool2d(sign * values_HLS, side) for sign in (1, -1))
        return torch.where(high >= low, high, -low)

    return torch.stack([shrink(values_HLS) for values_HLS in values_NHLS])


def moved(a: AttentionPatterns, b: AttentionPatterns) -> Tensor:
    """NH: the share of its attention that a head spends elsewhere in B (total variation, mean over positions)."""
    pairs = zip(a.probs_NHLS, b.probs_NHLS, strict=True)
    return torch.stack([(one - other).abs().sum(-1).mean(-1) / 2 for one, other in pairs])


@torch.no_grad()
def _patterns(lm: LanguageModel, ids: list[int]) -> AttentionPatterns:
    sites = [f"{stack_prefix(lm.model)}layers.{n}.attn.probs" for n in range(lm.config.num_hidden_layers)]
    if sites[0] not in lm.model.sites:
        raise DataError(f"a {lm.config.model_type} of kind {lm.config.kind!r} has no heads that attend to its tokens.")
    with observe(lm.model, sites) as seen:
        lm.model.hidden(torch.tensor([ids], device=lm.model.device))
    probs = [seen[site][0].float().cpu() for site in sites]
    return AttentionPatterns(ids, [label(lm.tokenizer, number) for number in ids], torch.stack(probs))

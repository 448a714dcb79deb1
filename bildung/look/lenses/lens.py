"""The logit lens: what would the model say if it stopped after this layer? (nostalgebraist 2020)

    lens_l(h) = W_U · LN_f(h_l)            h_l: the residual stream after block l, before the final norm

The final norm belongs to the lens, once. (Feeding Hugging Face's `hidden_states[-1]`, which is normalised already,
through it again is a well-known mistake.) `unembed` is the model's own, with its scale and its soft-cap (Gemma), so the
last row is the model's own prediction, bit for bit. A masked encoder is read through its masked-language head, which
says what stands AT a position; an encoder-decoder in its decoder, while it answers a source. Early layers write in a
basis of their own, so a poor lens does not prove that the layer knows nothing; a tuned lens (translators.py)
translates each first (Belrose et al. 2023).
"""

# N layers, L positions, K kept candidates, D hidden_size, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.core.hardware import Tidy
from bildung.look.asked import stack_prefix, with_source
from bildung.look.lenses.translators import TunedLens, check_belongs
from bildung.look.precise import check_numbers
from bildung.look.prompt import check_same_model_shape, check_same_tokens, encode_prompt, label, text_in
from bildung.model.base import CausalLM
from bildung.model.encoder import Encoder
from bildung.model.store import LanguageModel
from bildung.model.taps import observe

CANDIDATES = 5
LONGEST = 512  # tokens
ANSWER = 16  # tokens that an encoder-decoder answers, where no answer is given


@dataclass
class LogitLens:
    """One reading. Row n is the stream after layer n; column l predicts the token that follows position l (of a masked
    encoder: that stands there)."""

    tokens: list[int]
    labels: list[str]  # of the tokens, for people
    top_ids_NLK: Tensor  # most probable first
    top_probs_NLK: Tensor
    rank_NL: Tensor  # place of the final prediction in this row's ranking; 1 = it is the top token
    kl_NL: Tensor  # KL(final || lens), nats
    entropy_NL: Tensor  # of the lens, nats
    next_probs_NL: Tensor  # probability of the token that really follows (stands there); NaN at the last position
    words: dict[int, str]  # label of every id in top_ids
    in_place: bool = False  # a masked encoder's


@dataclass
class LensDifference:
    """Two models reading the same tokens."""

    a: LogitLens
    b: LogitLens
    kl_NL: Tensor  # KL(A || B) of the lenses at each layer, nats; the last row: of the models' predictions
    first_L: Tensor  # the first layer at which the top tokens differ; -1 where they never do


def lens_logits(model: CausalLM | Encoder, h_BLD: Tensor) -> Tensor:
    """W_U · LN_f(h): logits BLV of a residual stream that has not seen the final norm."""
    return model.unembed(model.final_norm(h_BLD))


@torch.no_grad()
def logit_lens(
    lm: LanguageModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    chat: bool = False,
    max_tokens: int = LONGEST,
    tuned: TunedLens | None = None,
    answer: str | Sequence[int] | None = None,
) -> LogitLens:
    """Read every layer at every position of a text or of token ids; plain, adapted, quantized and edited models alike.

    chat: the text is a user's turn. tuned: read through a tuned lens. answer: of a model that answers a source, the
    target whose positions are read (default: its own answer). Raises DataError for a prompt that is empty or longer
    than max_tokens and for a model without an unembedding, ModelFileError for a lens of other weights.
    """
    check_has_lens(lm)
    lm, ids = text_in(lm, prompt, chat=chat, limit=max_tokens, answer=answer, new_tokens=ANSWER)
    reading, tidy = _Reading(lm, ids, tuned), Tidy()
    for layer in range(lm.config.num_hidden_layers):
        reading.row(layer)
        tidy()
    return reading.result()


@torch.no_grad()
def lens_difference(
    a: LanguageModel,
    b: LanguageModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    chat: bool = False,
    max_tokens: int = LONGEST,
    tuned: tuple[TunedLens | None, TunedLens | None] = (None, None),
    answer: str | Sequence[int] | None = None,
) -> LensDifference:
    """Read two models on the same token ids (with `chat`: those of A's template); tuned: the lens of each, if any.
    answer: as for one model; by default both read A's.

    Raises TokenizerError when their tokenizers disagree, DataError when one has more layers than the other.
    """
    check_has_lens(a)
    check_has_lens(b)
    ids = encode_prompt(a, prompt, chat, max_tokens)
    check_same_tokens(a, b, ids, prompt, chat)
    check_same_model_shape(a, b)
    source = ids
    a, ids = text_in(a, ids, limit=max_tokens, answer=answer, new_tokens=ANSWER)
    b = with_source(b, source) if hasattr(b.model, "given") else b
    one, other, tidy = _Reading(a, ids, tuned[0]), _Reading(b, ids, tuned[1]), Tidy()
    # Layer by layer in step: the log-probabilities of all layers at once would be N x L x V numbers.
    kls = []
    for layer in range(a.config.num_hidden_layers):
        kls.append(kl(one.row(layer), other.row(layer)))
        tidy()
    kl_NL = torch.stack(kls)
    first, second = one.result(), other.result()
    differs_NL = first.top_ids_NLK[..., 0] != second.top_ids_NLK[..., 0]
    return LensDifference(first, second, kl_NL, torch.where(differs_NL.any(0), differs_NL.int().argmax(0), -1))


def check_has_lens(lm: LanguageModel) -> None:
    """Raises DataError for a model that lenses cannot read."""
    if lm.config.kind == "seq2seq" and lm.config.attention != "none":
        raise DataError(
            f"in this {lm.config.model_type} what is said comes from a layer's state and from what attention finds in "
            "the source, by one tanh; a layer's state alone is not read by the unembedding. See `look alignment`."
        )
    if isinstance(lm.model, CausalLM) or hasattr(lm.model, "given"):
        return
    if not isinstance(lm.model, Encoder) or lm.model.lm_head is None:
        raise DataError(
            f"this {lm.config.model_type} of kind {lm.config.kind!r} turns no state into tokens: it neither continues "
            "text nor has a masked-language head, and a lens shows how a token forms. Probe its layers instead: "
            "bildung look probe."
        )


def check_writes(lm: LanguageModel, answers: bool = False) -> None:
    """Raises DataError for a model that does not write text. answers: one that answers a source does, too."""
    if not isinstance(lm.model, CausalLM) and not (answers and hasattr(lm.model, "given")):
        raise DataError(
            f"a {lm.config.model_type} of kind {lm.config.kind!r} does not continue text; probe its layers instead: "
            "bildung look probe."
        )


def kl(p_LV: Tensor, q_LV: Tensor) -> Tensor:
    """KL(p || q) in nats of each row of log-probabilities; rounding cannot make it negative."""
    return (p_LV.exp() * (p_LV - q_LV)).sum(-1).clamp_min(0.0)


class _Reading:
    """Reads one model row by row and keeps the small numbers of each."""

    def __init__(self, lm: LanguageModel, ids: list[int], tuned: TunedLens | None = None):
        if tuned is not None:
            check_belongs(tuned, lm)
        self.lm, self.ids, self.tuned = lm, ids, tuned
        tokens_BL = torch.tensor([ids], device=lm.model.device)
        sites = [f"{stack_prefix(lm.model)}layers.{n}.resid_post" for n in range(lm.config.num_hidden_layers)]
        with observe(lm.model, sites) as seen:
            logits_BLV = lm.model(tokens_BL)
        self.streams = [seen[site] for site in sites]
        self.final_LV = logits_BLV[0].float().log_softmax(-1)
        check_numbers(logits_BLV, f"what {lm.config.model_type} says next")
        self.best_L1 = self.final_LV.argmax(-1, keepdim=True)
        self.in_place = isinstance(lm.model, Encoder)
        self.next_L1 = (tokens_BL[0] if self.in_place else tokens_BL[0].roll(-1))[:, None]
        self.rows: list[tuple[Tensor, ...]] = []

    def row(self, layer: int) -> Tensor:
        """The lens at `layer` as log-probabilities LV."""
        h_BLD = self.streams[layer] if self.tuned is None else self.tuned(self.streams[layer], layer)
        log_probs_LV = lens_logits(self.lm.model, h_BLD)[0].float().log_softmax(-1)
        top = log_probs_LV.topk(min(CANDIDATES, log_probs_LV.shape[-1]))
        rank_L = (log_probs_LV > log_probs_LV.gather(-1, self.best_L1)).sum(-1) + 1
        next_L = log_probs_LV.gather(-1, self.next_L1)[:, 0].exp()
        if not self.in_place:
            next_L[-1] = float("nan")
        entropy_L = -(log_probs_LV.exp() * log_probs_LV).sum(-1)
        self.rows.append((top.indices, top.values.exp(), rank_L, kl(self.final_LV, log_probs_LV), entropy_L, next_L))
        return log_probs_LV

    def result(self) -> LogitLens:
        ids_NLK, probs_NLK, rank_NL, kl_NL, entropy_NL, next_NL = (
            torch.stack(column).cpu() for column in zip(*self.rows, strict=True)
        )
        return LogitLens(
            tokens=self.ids,
            labels=[label(self.lm.tokenizer, number) for number in self.ids],
            top_ids_NLK=ids_NLK,
            top_probs_NLK=probs_NLK,
            rank_NL=rank_NL,
            kl_NL=kl_NL,
            entropy_NL=entropy_NL,
            next_probs_NL=next_NL,
            words={number: label(self.lm.tokenizer, number) for number in ids_NLK.unique().tolist()},
            in_place=self.in_place,
        )

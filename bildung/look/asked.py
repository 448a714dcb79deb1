"""One way to look into every kind of model: what it reads, where it answers, and what its stacks of layers are called.

    kind               reads                                        answers                         its layers
    decoder            a text                                       the token after the last        layers.N
    encoder-decoder    a source, and what it has answered so far    the next token of the answer    encoder., decoder.
    masked encoder     a text with one [MASK]                       the token at the mask           layers.N
    classifier         a text                                       a class                         layers.N

    WithSource    the decoder of an encoder-decoder, its source in mind: a causal model of the answer. For lenses,
                  attribution, heads and Patchscopes it is a decoder whose layers are called decoder.layers.N
    SourceReader  its encoder, as an encoder
    Asked         any of them as one function: texts -> a row of logits each. For patching, tracing, edges and saliency

All read the source anew in every pass, so that what somebody observes or changes in the encoder is met. (`model.given`
reads it once, which is right for decoding.)
"""

# B rows, L text or answer length, S source length, D hidden_size, V vocabulary or classes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bildung.core.errors import DataError
from bildung.model.base import CausalLM, Model
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.encoder import Encoder
from bildung.model.encoder_decoder import EncoderDecoder
from bildung.model.store import LanguageModel

StackName = Literal["encoder", "decoder"]


class WithSource(CausalLM):
    """`model(answer_BL) -> logits_BLV` of an encoder-decoder or a recurrent seq2seq model; all rows have one source."""

    stack = "decoder."

    def __init__(self, whole: Any, source: Sequence[int]):
        super().__init__(whole.config)
        self.whole, self.source = whole, tuple(source)
        self.lm_head, self.taps, self.sites, self.attached = whole.lm_head, whole.taps, whole.sites, whole.attached
        self.compute_dtype, self.training = whole.compute_dtype, whole.training
        self._read: list[CausalLM] = []  # the source as read with the cache in use: a list, so that it is no submodule

    @property
    def embedding(self) -> nn.Module:
        return self.whole.shared

    def _given(self, rows: int) -> CausalLM:
        source_1S = torch.tensor([self.source], device=self.device)
        given: CausalLM = self.whole.given(source_1S.expand(rows, -1))
        return given

    def kv_cache(self, batch_size: int, max_length: int) -> Any:
        with torch.no_grad(), self.taps.attached_only():
            return self._given(batch_size).kv_cache(batch_size, max_length)

    def hidden(
        self,
        tokens_BL: Tensor,
        *,
        positions_BL: Tensor | None = None,
        keep_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        prefix_BL: Tensor | None = None,
        kv_cache: Any = None,
    ) -> Tensor:
        rows = len(tokens_BL)
        if kv_cache is not None and kv_cache.length and self._read:
            given = self._read[0].select(torch.zeros(rows, dtype=torch.long, device=self.device))
        else:
            given = self._given(rows)
            self._read = [given] if kv_cache is not None else []
        return given.hidden(
            tokens_BL.to(self.device),
            positions_BL=positions_BL,
            keep_BL=keep_BL,
            segments_BL=segments_BL,
            prefix_BL=prefix_BL,
            kv_cache=kv_cache,
        )

    def final_norm(self, x_BLD: Tensor) -> Tensor:
        normed: Tensor = self.whole.decoder.final(x_BLD)
        return normed

    def unembed(self, h_BLD: Tensor) -> Tensor:
        logits: Tensor = self.whole.unembed(h_BLD)
        return logits


class SourceReader(Model):
    """The encoder of an encoder-decoder, as an encoder: `hidden(source_BS)`. config: the encoder's own."""

    stack = "encoder."

    def __init__(self, whole: EncoderDecoder):
        super().__init__(whole.encoder.config)
        self.whole = whole
        self.taps, self.sites, self.attached = whole.taps, whole.sites, whole.attached
        self.compute_dtype, self.training = whole.compute_dtype, whole.training

    @property
    def embedding(self) -> nn.Module:
        return self.whole.shared

    def hidden(self, tokens_BL: Tensor, *, keep_BL: Tensor | None = None) -> Tensor:
        """Its states BLD, which the decoder looks at."""
        return self.whole.encode(tokens_BL.to(self.device), keep_BL).states_BSD


class Asked(Model):
    """A model and what is asked of it: `logits(tokens_BL)` is one row per text.

    answer: of a model that answers a source, what it has answered so far (default: its start token). mask_id: of a
    masked encoder, the token whose place is asked for. Raises DataError for a model that has no answer to give.
    """

    def __init__(self, whole: Any, answer: Sequence[int] = (), mask_id: int | None = None):
        super().__init__(whole.config)
        self.whole, self.mask_id = whole, mask_id
        self.taps, self.sites, self.attached = whole.taps, whole.sites, whole.attached
        self.compute_dtype, self.training = whole.compute_dtype, whole.training
        self.answers_source = hasattr(whole, "given")
        self.stack = stack_prefix(whole)
        self.answer = (tuple(answer) or (whole.config.decoder_start_token_id,)) if self.answers_source else ()
        self.has_classes = isinstance(whole, DecoderClassifier) or getattr(whole, "classifier", None) is not None
        masked = isinstance(whole, Encoder) and whole.lm_head is not None
        if not (self.answers_source or self.has_classes or masked or isinstance(whole, CausalLM)):
            raise DataError(
                f"a {whole.config.model_type} of kind {whole.config.kind!r} has no class, no next token and no masked "
                "token to ask for; language models and text classifiers have (for images: `look image_attention`)."
            )

    @property
    def embedding(self) -> nn.Module:
        made: nn.Module = self.whole.embedding
        return made

    def logits(self, tokens_BL: Tensor) -> Tensor:
        """BV: of the next token, of the masked one, or of the classes. Raises DataError for a text without its mask."""
        whole, rows = self.whole, len(tokens_BL)
        if self.answers_source:
            answer_1L = torch.tensor([self.answer], device=tokens_BL.device)
            given: CausalLM = whole.given(tokens_BL)
            return given.unembed(given.hidden(answer_1L.expand(rows, -1))[:, -1:])[:, 0]
        if self.has_classes:
            found: Tensor = whole.classes(tokens_BL) if isinstance(whole, Encoder) else whole(tokens_BL)
            return found
        h_BLD: Tensor = whole.hidden(tokens_BL)
        if isinstance(whole, CausalLM):
            return whole.unembed(h_BLD[:, -1:])[:, 0]
        is_mask_BL = tokens_BL.eq(-1 if self.mask_id is None else self.mask_id)
        if not bool((is_mask_BL.sum(1) == 1).all()):
            raise DataError(
                f"a {whole.config.model_type} says what stands at a mask: give each text exactly one mask token, "
                "written as the tokenizer names it, such as [MASK]."
            )
        at_B = is_mask_BL.int().argmax(1)
        h_B1D = h_BLD[torch.arange(rows, device=h_BLD.device), at_B][:, None]
        logits_BV: Tensor = whole.unembed(h_B1D)[:, 0]
        return logits_BV


def stack_prefix(model: Any) -> str:
    """What the sites of the layers begin with that read the tokens: "" where there is one stack."""
    found: str = getattr(model, "stack", "encoder." if hasattr(model, "given") else "")
    return found


def with_source(lm: LanguageModel, source: Sequence[int]) -> LanguageModel:
    """The same model as a causal one of its answer to this source (token ids)."""
    return replace(lm, model=WithSource(lm.model, source))


def whole_of(model: Any) -> Any:
    """The model as it was loaded."""
    return model.whole if isinstance(model, WithSource | SourceReader | Asked) else model


def stack_in(lm: LanguageModel, stack: StackName, source: Sequence[int]) -> LanguageModel:
    """One stack of an encoder-decoder: its encoder, or its decoder with a source in mind. Other models as they are."""
    if not isinstance(lm.model, EncoderDecoder):
        return lm
    if stack == "decoder":
        return with_source(lm, source)
    reader = SourceReader(lm.model)
    return replace(lm, model=reader, config=reader.config)


def mask_id_of(lm: LanguageModel) -> int | None:
    """The id of the tokenizer's mask, if it names one."""
    name = lm.tokenizer.named["mask_token"]
    return None if name is None else lm.tokenizer.id_of(name)


def asked(lm: LanguageModel, answer: Sequence[int] = ()) -> Asked:
    """A loaded model with its question; see `Asked`."""
    return Asked(lm.model, answer, mask_id_of(lm))


def classes_of(lm: LanguageModel) -> dict[int, str]:
    """The names of a classifier's classes, where its config names them."""
    return {int(number): str(name) for number, name in (lm.config.raw.get("id2label") or {}).items()}


def one_token(lm: LanguageModel, text: str | int) -> int:
    """The id of a text that is one token, or an id as it is. Raises DataError."""
    if isinstance(text, int):
        if isinstance(text, bool) or not 0 <= text < lm.config.vocab_size:
            raise DataError(f"{text} is not a token id; allowed: 0 to {lm.config.vocab_size - 1}.")
        return text
    ids = lm.tokenizer.encode(text, bos=False)
    if ids == [lm.tokenizer.unk_id]:
        raise DataError(f"this tokenizer does not know {text!r}: its id would be that of everything unknown.")
    if len(ids) != 1:
        parts = ", ".join(repr(lm.tokenizer.decode([number])) for number in ids)
        raise DataError(f"{text!r} is {len(ids)} tokens ({parts}); a logit belongs to one. A space may be part of it.")
    return ids[0]


def answer_number(lm: LanguageModel, model: Asked, target: str | int) -> int:
    """Which of the logits is meant: a class by name or number, a token by its text or id. Raises DataError."""
    if not model.has_classes:
        return one_token(lm, target)
    count, names = lm.config.num_labels, {name: number for number, name in classes_of(lm).items()}
    if isinstance(target, str) and target in names:
        return names[target]
    if str(target).isdigit() and int(target) < count:
        return int(target)
    raise DataError(f"{target!r} is no class of this model; {', '.join(names) or f'0 to {count - 1}'} are.")

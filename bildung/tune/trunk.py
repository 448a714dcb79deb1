"""A classifier as the language model that it was made of: its layers as they are now, below its source's language head.

    tokens -> the layers that are tuned ─┬─ score of the classes
                                         └─ the source's language head: the next token, or the masked one

A head for classes takes the language head's place, not its layers'. With that head put back, a budget for forgetting
(forgetting.py) measures what the layers still know of language, and texts to rehearse teach it.

    a decoder     reads its unembedding from the source; a tied one is the embedding, as it is now
    an encoder    its masked-language head (BERT's ...ForMaskedLM, ...ForPreTraining)

The head itself does not train, a tied matrix aside: tuning a classifier does not touch it, so all that is lost is lost
in the layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bildung.core.errors import SettingsError
from bildung.data.batches import Batch, Shuffled, clm_examples, pad
from bildung.data.masking import DynamicMasks, MaskedBatch, Masker, Sentences, mask_generator, pad_sentences, pieces
from bildung.data.text import documents
from bildung.model.base import CausalLM
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.encoder import Encoder
from bildung.model.store import LanguageModel, load
from bildung.model.transformer import Decoder
from bildung.tokens.frames import frame_of
from bildung.train.loss import LossSum, Objective
from bildung.train.masked import mlm
from bildung.train.objectives import clm
from bildung.train.training import Batches


def has_language_head(lm: LanguageModel) -> bool:
    """Whether the model continues text or fills in masked words, or did before a tied decoder became a classifier."""
    model = lm.model
    if isinstance(model, DecoderClassifier):
        return model.config.tie_word_embeddings and not model.config.head_bias
    return isinstance(model, CausalLM) or (isinstance(model, Encoder) and model.lm_head is not None)


def with_language_head(lm: LanguageModel) -> LanguageModel:
    """The model itself, if it has a language head; a classifier whose unembedding is its embedding as the decoder that
    it was. Raises SettingsError where there is none."""
    if not has_language_head(lm):
        heads = ", ".join(getattr(lm.config, "heads", ())) or "none"
        raise SettingsError(
            f"{lm.path} is a {lm.config.model_type} of kind {lm.config.kind!r} (heads: {heads}), which neither "
            f"continues text nor fills in masked words, and by one of these it is measured what a tuning loses. Start "
            f"from a directory that has such a head (a decoder; an encoder saved as ...ForMaskedLM or "
            f"...ForPreTraining), or leave forget_budget, forget_data and rehearse out."
        )
    if not isinstance(lm.model, DecoderClassifier):
        return lm
    config = replace(lm.model.config, kind="decoder")
    with torch.device("meta"):
        speaker = replace(lm, model=Decoder(config), config=config)
    put_layers(speaker, lm)
    return speaker


def put_layers(speaker: LanguageModel, lm: LanguageModel) -> None:
    """Have `speaker` run through the layers of `lm` themselves, with all that is added to them."""
    theirs, ours = lm.model, speaker.model
    ours.model, ours.taps, ours.attached = theirs.model, theirs.taps, theirs.attached
    ours.compute_dtype = theirs.compute_dtype
    ours.tie()
    left = theirs.config.max_position_embeddings  # virtual tokens take from it
    ours.config = speaker.config = replace(ours.config, max_position_embeddings=left)


def speaking(lm: LanguageModel, source: Path) -> LanguageModel:
    """`lm` as a language model: itself, or its layers below the head that `source` has. Raises SettingsError."""
    if isinstance(lm.model, CausalLM):
        return lm
    speaker = with_language_head(load(source, lm.model.weight_dtype, lm.model.device))
    speaker.model.requires_grad_(False)
    put_layers(speaker, lm)
    return speaker


def for_card(lm: LanguageModel, source: Path) -> LanguageModel:
    """`lm` as its card measures it: a decoder that classifies as a language model, if `source` has the head for it;
    others as they are."""
    if isinstance(lm.model, DecoderClassifier) and has_language_head(load(source)):
        return speaking(lm, source)
    return lm


def fixed_batches(lm: LanguageModel, source: str, texts: int, length: int) -> list[Batch | MaskedBatch]:
    """The first pieces of general texts, for a language model to be measured on: always the same, masks too."""
    if isinstance(lm.model, Encoder):
        rows = _sentences(lm, source, length, texts)[:texts]
        masker, pad_id = Masker(lm.tokenizer), lm.tokenizer.pad_id
        eights = (rows[start : start + 8] for start in range(0, len(rows), 8))
        plain = (pad_sentences([[row] for row in eight], pad_id) for eight in eights)
        return [masker(batch, mask_generator("general texts", n)) for n, batch in enumerate(plain)]
    found = list(clm_examples(lm.tokenizer, documents(source, limit=texts), length))[:texts]
    return [pad(found[start : start + 8], lm.tokenizer.pad_id) for start in range(0, len(found), 8)]


def text_loss(model: CausalLM | Encoder, batch: Batch | MaskedBatch) -> LossSum:
    """-log p of the next tokens, or of the masked ones."""
    return mlm(model, batch) if isinstance(batch, MaskedBatch) else clm(model, batch)  # type: ignore[arg-type]


def text_batches_of(lm: LanguageModel, source: str, length: int, batch_size: int, seed: int) -> Batches:
    """General texts as batches to learn language from: rows of a piece each, cut to `length`."""
    pad_id = lm.tokenizer.pad_id
    if isinstance(lm.model, Encoder):
        rows = [[row] for row in _sentences(lm, source, length, None)]
        collate = partial(pad_sentences, pad_id=pad_id)
        return DynamicMasks(rows, batch_size, seed, collate, Masker(lm.tokenizer))
    examples = clm_examples(lm.tokenizer, documents(source), length)
    return Shuffled(examples, batch_size, seed, partial(pad, pad_id=pad_id))


@dataclass(frozen=True)
class WithTexts:
    """The objective of a classifier whose batches are now and then of general texts, which are learned as language.

    A row of text weighs as a text with a class does, however many tokens it has: the mean loss of the batch's tokens
    stands for each of its rows. The log says of such a step that it was `rehearsed`.
    """

    own: Objective
    speaker: CausalLM | Encoder  # the same layers below the language head

    def __call__(self, model: Any, batch: Any) -> LossSum:
        if not isinstance(batch, Batch | MaskedBatch):
            return self.own(model, batch)
        found, rows = text_loss(self.speaker, batch), len(batch.tokens_BL)
        return LossSum(found.total * (rows / max(found.count, 1)), rows, {"rehearsed": float(rows)})


def _sentences(lm: LanguageModel, source: str, length: int, limit: int | None) -> list[Sentences]:
    encoded = (lm.tokenizer.encode(text, bos=False) for text in documents(source, limit=limit))
    return pieces(encoded, frame_of(lm.tokenizer), length)

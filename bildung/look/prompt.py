"""The text one looks at: its token ids, and a short readable label for each of them.

Each kind of model reads a text as it was trained to: a decoder behind its BOS, an encoder between its [CLS] and [SEP]
(where a [MASK] may stand in the text), an encoder-decoder as a source, with what it has answered so far beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from bildung.core.errors import DataError, TokenizerError
from bildung.data.seq2seq import text_frame
from bildung.look.asked import Asked, SourceReader, StackName, WithSource, classes_of, stack_in, with_source
from bildung.model.encoder import Encoder
from bildung.model.store import LanguageModel
from bildung.run.write import write
from bildung.tokens.chat_template import encode_chat
from bildung.tokens.frames import Frame, decoder_frame, frame_of
from bildung.tokens.spans import encode_with_spans
from bildung.tokens.tokenizer import Tokenizer

# Whitespace is part of a token (" the" and "the" are two), so it must be seen.
VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
LABEL = 24  # characters


def encode_prompt(lm: LanguageModel, prompt: str | Sequence[int] | Tensor, chat: bool, limit: int) -> list[int]:
    """Token ids of a text with what stands around it, or ids as they are. chat: the text is a user's turn, in front of
    the answer's first token.

    Raises DataError for no token, more than `limit` or the model's context, or an id that the model does not have.
    """
    if isinstance(prompt, str):
        if chat:
            ids = encode_chat(lm.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        else:
            ids = encode_text(lm, prompt)[0]
    else:
        given = torch.as_tensor(prompt)
        several = given.ndim > 1 and given.numel() != given.shape[-1]
        if given.numel() and (several or given.is_floating_point() or given.dtype == torch.bool):
            raise DataError(
                f"{given.dtype} of shape {tuple(given.shape)} was given; a prompt is a text, or the ids of one text."
            )
        ids = given.flatten().tolist()
    context = lm.config.max_position_embeddings
    if not 0 < len(ids) <= min(limit, context):
        remedy = f"Shorten it{' or raise max_tokens' if limit < context else ''}." if ids else "Give some text."
        what = "can be looked at" if limit < context else f"are the context of this {lm.config.model_type}"
        raise DataError(f"the prompt has {len(ids)} tokens; 1 to {min(limit, context)} {what}. {remedy}")
    if wrong := [number for number in ids if not 0 <= number < lm.config.vocab_size]:
        raise DataError(f"{wrong[0]} is not a token id; allowed: 0 to {lm.config.vocab_size - 1}.")
    return ids


def encode_text(lm: LanguageModel, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(token ids as this model reads a text, the [start, end) of the text that each stands for, empty for what the
    frame adds). In an encoder's text the name of its mask, such as [MASK], is that token."""
    frame, spans, ids = frame_around(lm), list[tuple[int, int]](), list[int]()
    mask = lm.tokenizer.named["mask_token"] if isinstance(lm.model, Encoder) else None
    at = 0
    for part in re.split(f"({re.escape(mask)})", text) if mask is not None else [text]:
        found, places = ([lm.tokenizer.id_of(part)], [(0, len(part))]) if part == mask else ([], [])
        if part and part != mask:
            found, places = encode_with_spans(lm.tokenizer, part)
        ids += found
        spans += [(at + start, at + end) for start, end in places]
        at += len(part)
    if not ids and frame.after:
        return ids, spans  # nothing but a frame is no text
    before = [] if list(frame.before) == ids[: len(frame.before)] else list(frame.before)
    return [*before, *ids, *frame.after], [(0, 0)] * len(before) + spans + [(at, at)] * len(frame.after)


def frame_around(lm: LanguageModel) -> Frame:
    """The special tokens around a text that this model reads."""
    if isinstance(lm.model, WithSource):
        return Frame((lm.config.decoder_start_token_id, *text_frame(lm.tokenizer).before), (), (), 0)
    if (
        hasattr(lm.model, "given")
        or isinstance(lm.model, SourceReader)
        or getattr(lm.config, "prefix_lm", None) == "source"
    ):
        return text_frame(lm.tokenizer)
    if lm.config.kind != "encoder":
        return decoder_frame(lm.tokenizer)
    try:
        return frame_of(lm.tokenizer)
    except TokenizerError:  # neither a post-processor nor [CLS] and [SEP]: there is nothing to put around a text
        return Frame((), (), (), 0)


def text_in(
    lm: LanguageModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    chat: bool = False,
    limit: int,
    answer: str | Sequence[int] | None = None,
    new_tokens: int = 0,
) -> tuple[LanguageModel, list[int]]:
    """(what runs, the token ids that it reads): of most models themselves and the prompt.

    Of a model that answers a source, which the prompt then is: its decoder with that source in mind (`WithSource`), and
    the start token with `answer`, which it has answered so far; None: what it answers itself, at most `new_tokens`.
    Raises DataError as `encode_prompt`, and for an answer where nothing is answered.
    """
    ids = encode_prompt(lm, prompt, chat, limit)
    if not hasattr(lm.model, "given"):
        if answer:
            raise DataError(
                f"a {lm.config.model_type} answers no source; what it has said so far belongs to the prompt."
            )
        return lm, ids
    told = with_source(lm, ids)
    if answer is None and new_tokens:
        said = write(lm.model, lm.tokenizer, [ids], new_tokens)[0][0].tokens
        answer = [lm.config.decoder_start_token_id, *(one for one in said if one not in lm.tokenizer.stop_ids)]
    if not answer:
        return told, [lm.config.decoder_start_token_id]
    return told, encode_prompt(told, answer, False, limit)


def half(lm: LanguageModel, stack: StackName) -> LanguageModel:
    """One stack of an encoder-decoder, for looks that read no prompt: the decoder answers a source without words."""
    return stack_in(lm, stack, text_frame(lm.tokenizer).after if hasattr(lm.model, "given") else ())


def check_same_tokens(a: LanguageModel, b: LanguageModel, ids: list[int], prompt: object, chat: bool) -> None:
    """Raises TokenizerError unless both models read the prompt as the same ids, and the ids as the same tokens."""
    if a.config.vocab_size != b.config.vocab_size:
        raise TokenizerError(
            f"the models have {a.config.vocab_size} and {b.config.vocab_size} tokens; only models of one vocabulary "
            "can be compared token by token."
        )
    # A tune may come with a chat template of its own; then A's ids are what both models read.
    other = encode_text(b, prompt)[0] if isinstance(prompt, str) and not chat else ids
    if other != ids or a.tokenizer.backend.get_vocab() != b.tokenizer.backend.get_vocab():
        raise TokenizerError(
            "the two models split the prompt into different tokens; only models that share a tokenizer can be "
            "compared position by position."
        )


def check_same_model_shape(a: LanguageModel, b: LanguageModel) -> None:
    """Raises DataError unless both models have the same layers and heads."""
    for what, name in (("layers", "num_hidden_layers"), ("attention heads", "num_attention_heads")):
        first, second = getattr(a.config, name, 0), getattr(b.config, name, 0)  # a recurrent model has no heads
        if first != second:
            raise DataError(f"the models have {first} and {second} {what}; only models of one shape can be compared.")


def answer_name(lm: LanguageModel, question: Asked, number: int) -> str:
    """What one of the logits is called: a class, or a token for people."""
    return classes_of(lm).get(number, str(number)) if question.has_classes else label(lm.tokenizer, number)


def label(tokenizer: Tokenizer, number: int) -> str:
    """One token for people: "·the", "↵". A token that is half a character is shown as the vocabulary spells it."""
    if number >= tokenizer.vocab_size:
        return f"#{number}"  # embeddings are often padded to a round size; those rows have no token
    spelled = tokenizer.token_of(number)
    text = spelled.replace("▁", " ") if "▁" in spelled else tokenizer.decode([number])
    if "\ufffd" in text or not text:
        text = spelled
    text = re.sub(r"\s", lambda match: VISIBLE.get(match.group(), "␣"), text)
    return text if len(text) <= LABEL else text[: LABEL - 1] + "…"

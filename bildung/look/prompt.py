"""The text one looks at: its token ids, and a short readable label for each of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from bildung.core.errors import DataError, TokenizerError
from bildung.model.store import LanguageModel
from bildung.tokens.chat_template import encode_chat
from bildung.tokens.tokenizer import Tokenizer

# Whitespace is part of a token (" the" and "the" are two), so it must be seen.
VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
LABEL = 24  # characters


def encode_prompt(lm: LanguageModel, prompt: str | Sequence[int] | Tensor, chat: bool, limit: int) -> list[int]:
    """Token ids of a text, or ids as they are. chat: the text is a user's turn, in front of the answer's first token.

    Raises DataError for no token, more than `limit`, or an id that the model does not have.
    """
    if isinstance(prompt, str):
        if chat:
            ids = encode_chat(lm.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        else:
            ids = lm.tokenizer.encode(prompt)
    else:
        ids = [int(number) for number in torch.as_tensor(prompt).flatten()]
    if not 0 < len(ids) <= limit:
        remedy = "Shorten it or raise max_tokens." if ids else "Give some text."
        raise DataError(f"the prompt has {len(ids)} tokens; 1 to {limit} can be looked at. {remedy}")
    if wrong := [number for number in ids if not 0 <= number < lm.config.vocab_size]:
        raise DataError(f"{wrong[0]} is not a token id; allowed: 0 to {lm.config.vocab_size - 1}.")
    return ids


def check_same_tokens(a: LanguageModel, b: LanguageModel, ids: list[int], prompt: object, chat: bool) -> None:
    """Raises TokenizerError unless both models read the prompt as the same ids, and the ids as the same tokens."""
    if a.config.vocab_size != b.config.vocab_size:
        raise TokenizerError(
            f"the models have {a.config.vocab_size} and {b.config.vocab_size} tokens; only models of one vocabulary "
            "can be compared token by token."
        )
    # A tune may come with a chat template of its own; then A's ids are what both models read.
    other = b.tokenizer.encode(prompt) if isinstance(prompt, str) and not chat else ids
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

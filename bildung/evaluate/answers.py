"""Greedy answers for evaluation, cut at stop strings: what generate_until tasks and a card's samples need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bildung.evaluate.likelihood import batches
from bildung.run.loop import decode_steps
from bildung.tokens.chat_template import encode_chat
from bildung.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bildung.model.store import LanguageModel

ROWS = 16  # prompts that are answered at a time


def chat_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt as a user's turn, up to where the assistant speaks; as plain text without a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt)
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def answers(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int, until: Sequence[str] = (), rows: int = ROWS
) -> list[str]:
    """The most probable continuation, token by token, of each prompt; without what follows the first stop string.

    rows: prompts answered at a time, those of like length together. Raises SettingsError when a prompt and `new_tokens`
    exceed the model's context.
    """
    texts = [""] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    for batch in batches(lengths, rows * max(lengths, default=1)):
        for index, text in zip(batch, _answer_batch(lm, [prompts[i] for i in batch], new_tokens, until), strict=True):
            texts[index] = text
    return texts


def _answer_batch(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int, until: Sequence[str]
) -> list[str]:
    stop_ids = lm.tokenizer.stop_ids
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in decode_steps(lm.model, prompts, new_tokens=new_tokens, stop_ids=stop_ids):
        for row, token in enumerate(step.tokens):
            if step.running[row] and token not in stop_ids:
                tokens[row].append(token)
        texts = [_text(lm.tokenizer, row) for row in tokens] if until else []
        if until and all(
            cut(text, until) != text or not running for text, running in zip(texts, step.running, strict=True)
        ):
            break
    return [cut(_text(lm.tokenizer, row), until) for row in tokens]


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """What the tokens say. An unembedding padded beyond the tokenizer can yield ids that stand for nothing."""
    return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size], skip_special=True)


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]

"""From texts to examples: token ids with a mask that says which of them are learned.

The truncation rule: a conversation ends with its last target; one longer than `max_length` keeps its first `max_length`
tokens (so the BOS and the template's header survive) and is counted as truncated; when nothing to learn is left it is
dropped as "no target left". Prose is cut into pieces instead, and loses nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from bildung.core.errors import ChatTemplateError, DataError
from bildung.data.pairs import Pair
from bildung.data.rows import Rows
from bildung.data.text import Message, declared_tools
from bildung.tokens.chat_template import encode_conversation
from bildung.tokens.tokenizer import Tokenizer

T = TypeVar("T")
NO_TARGET = "no target left"


@dataclass(frozen=True)
class Example:
    """One training sequence.

    tokens     token ids
    loss_mask  loss_mask[i]: token i is a target, predicted from the tokens before it. (Hugging Face writes the same as
               `labels` with -100, which cannot be told from a value; here the mask is a mask.) The first token has
               nothing before it and is never a target.
    """

    tokens: list[int]
    loss_mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.loss_mask) or not self.tokens:
            raise DataError(f"an example of {len(self.tokens)} tokens with a mask of {len(self.loss_mask)}")
        if self.loss_mask[0]:
            raise DataError("the first token of an example cannot be a target: nothing comes before it")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True)
class PairExample:
    """The same prompt with the preferred and with the other answer; only the answers are targets."""

    chosen: Example
    rejected: Example

    @property
    def num_targets(self) -> int:
        return self.chosen.num_targets + self.rejected.num_targets


class Examples(list[T]):
    """A list of examples that knows what was left out on the way.

    dropped    reason -> number of examples left out
    truncated  number of examples shortened to max_length
    notes      sentences for the record: unusable rows, dropped and truncated examples
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self.notes: list[str] = []

    def close(self, origin: Iterable[object], max_length: int) -> Examples[T]:
        """Fill `notes`; raises DataError when there is nothing to train on."""
        if isinstance(origin, Rows) and origin.report():
            self.notes.append(f"{origin.name}: {origin.report()}")
        if self.dropped:
            parts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            self.notes.append(f"{sum(self.dropped.values())} examples dropped at max_length {max_length}: {parts}")
        if self.truncated:
            self.notes.append(f"{self.truncated} of {len(self)} examples truncated to {max_length} tokens")
        if not self:
            why = "; ".join(self.notes) or "there were no texts"
            raise DataError(f"no example to train on: {why}. Raise max_length or check the data.")
        return self


def num_targets(examples: Iterable[Example | PairExample]) -> int:
    """How many tokens one pass over `examples` trains."""
    return sum(example.num_targets for example in examples)


def clm_examples(tokenizer: Tokenizer, documents: Iterable[str], max_length: int) -> Examples[Example]:
    """Prose for causal language modelling: [BOS] text [EOS], cut into pieces of at most `max_length` tokens.

    Neighbouring pieces share one token (the last target of one is the first context of the next), so that every token
    of a document but its first is a target exactly once. Peers who cut without overlap lose one target per piece.
    """
    _check_length(max_length)
    examples: Examples[Example] = Examples()
    for text in documents:
        tokens = tokenizer.encode(text, bos=True)
        if tokenizer.eos_id is not None:
            tokens = [*tokens, tokenizer.eos_id]
        for start in range(0, max(len(tokens) - 1, 1), max_length - 1):
            piece = tokens[start : start + max_length]
            if len(piece) < 2:
                examples.dropped[NO_TARGET] += 1
            else:
                examples.append(Example(piece, [False] + [True] * (len(piece) - 1)))
    return examples.close(documents, max_length)


def chat_examples(tokenizer: Tokenizer, conversations: Iterable[list[Message]], max_length: int) -> Examples[Example]:
    """Conversations through the chat template; targets are the assistant's tokens with their end-of-turn token."""
    _check_length(max_length)
    examples: Examples[Example] = Examples()
    for messages in conversations:
        encoded = _encode_all(tokenizer, [messages], examples)
        if not encoded:
            continue
        example, shortened = _truncated(*encoded[0], max_length)
        if example is None:
            examples.dropped[NO_TARGET] += 1
            continue
        examples.truncated += shortened
        examples.append(example)
    return examples.close(conversations, max_length)


def pair_examples(tokenizer: Tokenizer, pairs: Iterable[Pair], max_length: int) -> Examples[PairExample]:
    """Preference pairs; targets are the tokens of the judged answer alone, not of earlier answers in the prompt.
    A pair is dropped when either side has no target left."""
    _check_length(max_length)
    examples: Examples[PairExample] = Examples()
    for pair in pairs:
        answers = [[*pair.prompt, {"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected)]
        encoded = _encode_all(tokenizer, answers, examples)
        if not encoded:
            continue
        sides = [_truncated(tokens, last_run(mask), max_length) for tokens, mask in encoded]
        (chosen, chosen_shortened), (rejected, rejected_shortened) = sides
        if chosen is None or rejected is None:
            examples.dropped[NO_TARGET] += 1
            continue
        examples.truncated += chosen_shortened or rejected_shortened
        examples.append(PairExample(chosen, rejected))
    return examples.close(pairs, max_length)


def last_run(mask: list[bool]) -> list[bool]:
    """`mask` with only its last unbroken run of True left: the last answer of a conversation."""
    end = len(mask)
    while end and not mask[end - 1]:
        end -= 1
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [start <= index < end for index in range(len(mask))]


def _encode_all(
    tokenizer: Tokenizer, conversations: list[list[Message]], examples: Examples[T]
) -> list[tuple[list[int], list[bool]]]:
    """Tokens and assistant mask of each conversation; none, and counted, when the template refuses one (its roles)."""
    try:
        return [encode_conversation(tokenizer, messages, declared_tools(messages)) for messages in conversations]
    except ChatTemplateError as error:
        if tokenizer.chat_template is None:
            raise
        examples.dropped[f"refused by the chat template ({str(error)[:200]})"] += 1
        return []


def _truncated(tokens: list[int], mask: list[bool], max_length: int) -> tuple[Example | None, bool]:
    """The example up to its last target (what follows it, a template's newline, teaches nothing), cut at `max_length`;
    and whether targets were lost. None when no target is left."""
    mask = [False, *mask[1:]]
    end = len(mask) - mask[::-1].index(True) if any(mask) else 0
    kept = min(end, max_length)
    return (Example(tokens[:kept], mask[:kept]) if any(mask[:kept]) else None), end > max_length


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise DataError(f"max_length = {max_length}: at least 2 tokens, one to read and one to predict")

"""Judged answers out of rows: pairs (one answer preferred to another) and single answers with a thumb up or down (KTO).

    TRL, explicit prompt    {"prompt": text or messages, "chosen": ..., "rejected": ...}
    TRL, implicit prompt    {"chosen": messages, "rejected": messages}: the same conversation up to the last answer
    ShareGPT                {"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}}    (llamafactory)
    Alpaca                  {"instruction", "input", "chosen", "rejected"}
    HH-RLHF                 {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}
    KTO                     {"prompt", "completion", "label"} or {"messages" or "conversations", "label"}

In every form the two answers must follow one and the same prompt; only the last answer is judged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bildung.data.rows import Row, Rows, Unusable
from bildung.data.sources import rows
from bildung.data.text import Message, alpaca_prompt, as_messages, as_turns, check_turns, conversation, with_system


@dataclass(frozen=True)
class Pair:
    """prompt: messages that end in a question; chosen, rejected: the two answers."""

    prompt: list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Thumb:
    """prompt: messages that end in a question; answer; desirable: whether somebody liked it."""

    prompt: list[Message]
    answer: str
    desirable: bool


def preference_pairs(source: str, *, split: str | None = None, limit: int | None = None) -> Rows[Pair]:
    """Each row as a Pair; see the module's docstring for the forms."""
    return rows(source, split=split).then(pair, limit)


def kto_rows(source: str, *, split: str | None = None, limit: int | None = None) -> Rows[Thumb]:
    """Each row as a Thumb."""
    return rows(source, split=split).then(thumb, limit)


def pair(row: Row) -> Pair:
    """One row's prompt and two answers. Raises Unusable."""
    if row.get("chosen") is None or row.get("rejected") is None:
        raise Unusable("no chosen and rejected")
    ways = [_whole_conversation(row, row[side]) for side in ("chosen", "rejected")]
    for messages in ways:
        check_turns(messages)
        if messages[-1]["role"] != "assistant":
            raise Unusable("chosen or rejected does not end in an answer")
    (*prompt, chosen), (*other_prompt, rejected) = ways
    if prompt != other_prompt:
        raise Unusable("chosen and rejected answer different prompts")
    _check_prompt(prompt)
    if not chosen["content"].strip() or not rejected["content"].strip():
        raise Unusable("empty answer")
    if chosen["content"] == rejected["content"]:
        raise Unusable("chosen equals rejected")
    return Pair(prompt, chosen["content"], rejected["content"])


def thumb(row: Row) -> Thumb:
    """One row's prompt, answer and verdict. Raises Unusable."""
    label = row.get("label", row.get("kto_tag"))
    verdict = {"true": True, "1": True, "false": False, "0": False}.get(str(label).lower())
    if verdict is None:
        raise Unusable("no label" if label is None else "label is neither true nor false")
    *prompt, answer = conversation(row)
    _check_prompt(prompt)
    return Thumb(prompt, answer["content"], verdict)


def _check_prompt(prompt: list[Message]) -> None:
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Unusable("the prompt does not end in a question")


def _whole_conversation(row: Row, answer: Any) -> list[Message]:
    """Prompt and one answer as one conversation, whichever form the row has."""
    if isinstance(answer, dict):
        answer = [answer]
    if row.get("prompt") is not None:
        turns = as_turns(answer, "assistant")
        if any(message["role"] != "assistant" for message in turns):
            # UltraFeedback: `prompt` is a copy of the question that the conversation already holds.
            asked = [message["content"] for message in as_turns(row["prompt"], "user")]
            if asked[-1:] != [message["content"] for message in turns[-2:-1]]:
                raise Unusable("the prompt is not the question that chosen and rejected answer")
            return with_system(row, turns)
        return with_system(row, as_turns(row["prompt"], "user") + turns)
    for key in ("conversations", "messages"):
        if row.get(key) is not None:
            return with_system(row, as_messages(row[key]) + as_turns(answer, "assistant"))
    if row.get("instruction") is not None:
        return alpaca_prompt(row) + as_turns(answer, "assistant")
    return with_system(row, _human_assistant(answer) if isinstance(answer, str) else as_messages(answer))


def _human_assistant(text: str) -> list[Message]:
    """HH-RLHF's transcript. (A turn that itself quotes "\\n\\nHuman:" would be cut there; the format cannot tell.)"""
    start, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if start.strip() or not turns:
        raise Unusable("chosen is plain text and there is no prompt")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]

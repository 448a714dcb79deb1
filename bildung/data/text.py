"""Prose and conversations out of rows. The form of a row is told by its keys, never guessed from its contents.

    OpenAI        {"messages": [{"role": "user", "content": ...}, ...]}
    ShareGPT      {"conversations": [{"from": "human", "value": ...}, ...], "system": ...}
    Alpaca        {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[question, answer], ...]}
    prompt        {"prompt": text or messages, "completion": text or messages}         (TRL)
    prose         {"text": ...}

A conversation is a list of {"role", "content"} messages of system, user, assistant and tool that ends in an answer.
Declared tools are kept where a row has them, as JSON in the system message's "tools" key.
"""

from __future__ import annotations

import json
from typing import Any

from bildung.data.rows import Row, Rows, Unusable
from bildung.data.sources import rows

Message = dict[str, str]
ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer word
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
FORMS = "messages, conversations, instruction and output, prompt and completion"


def documents(source: str, *, split: str | None = None, limit: int | None = None) -> Rows[str]:
    """The `text` of each row. Raises DataError when no row has one."""
    return rows(source, split=split).then(document, limit)


def conversations(source: str, *, split: str | None = None, limit: int | None = None) -> Rows[list[Message]]:
    """Each row as a conversation that ends in an assistant's answer; see the module's docstring for the forms."""
    return rows(source, split=split).then(conversation, limit)


def document(row: Row) -> str:
    """The row's prose. Raises Unusable."""
    text = row.get("text")
    if not isinstance(text, str):
        raise Unusable("no text" if text is None else "text is not a string")
    if not text.strip():
        raise Unusable("empty text")
    return text


def conversation(row: Row) -> list[Message]:
    """One row's messages, ending in an answer. Raises Unusable."""
    messages = row_messages(row)
    check_turns(messages)
    # What follows the last answer has nobody to learn from it.
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise Unusable("no assistant answer")
    if not any(message["role"] != "system" for message in messages[:-1]):
        raise Unusable("an answer without a question")
    if not messages[-1]["content"].strip():
        raise Unusable("empty answer")
    return messages


def row_messages(row: Row) -> list[Message]:
    """The messages of a row in any of the known forms, unchecked as to their order. Raises Unusable."""
    if row.get("messages") is not None:
        return with_system(row, as_messages(row["messages"]))
    if row.get("conversations") is not None:
        return with_system(row, as_messages(row["conversations"]))
    if row.get("instruction") is not None and "output" in row:
        return [*alpaca_prompt(row), {"role": "assistant", "content": as_text(row["output"], "output")}]
    if row.get("prompt") is not None and "completion" in row:
        return with_system(row, as_turns(row["prompt"], "user") + as_turns(row["completion"], "assistant"))
    raise Unusable(f"no known conversation keys ({FORMS})")


def alpaca_prompt(row: Row) -> list[Message]:
    """System, history and question of an Alpaca row: `input` follows `instruction` after a blank line."""
    messages: list[Message] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise Unusable("history is not a list of [question, answer]")
        messages.append({"role": "user", "content": as_text(turn[0], "history")})
        messages.append({"role": "assistant", "content": as_text(turn[1], "history")})
    question = as_text(row["instruction"], "instruction")
    if row.get("input"):
        question = f"{question}\n\n{as_text(row['input'], 'input')}".strip()
    if not question.strip():
        raise Unusable("empty instruction")
    return with_system(row, [*messages, {"role": "user", "content": question}])


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """Put the row's `system` column first, unless the messages already begin with a system message."""
    system = row.get("system")
    if system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": as_text(system, "system")}, *messages]
    tools = row.get("tools")
    if tools and tools != "[]":
        declared = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        _check_tools(declared)
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        messages = [{**messages[0], "tools": declared}, *messages[1:]]
    return messages


def _check_tools(declared: str) -> None:
    try:
        tools = json.loads(declared)
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools are not a JSON list of objects")


def declared_tools(messages: list[Message]) -> list[dict[str, Any]] | None:
    """The tools that a conversation's system message declares, for the chat template; None when it declares none."""
    declared = messages[0].get("tools") if messages else None
    return json.loads(declared) if declared else None


def as_turns(value: Any, role: str) -> list[Message]:
    """Messages as they are; a plain text becomes one message of `role`."""
    return [{"role": role, "content": value}] if isinstance(value, str) else as_messages(value)


def as_messages(value: Any) -> list[Message]:
    """OpenAI's role/content or ShareGPT's from/value objects as messages. Raises Unusable for anything else."""
    if not isinstance(value, list) or not value:
        raise Unusable("messages are not a list" if not isinstance(value, list) else "no messages")
    messages = []
    for turn in value:
        if not isinstance(turn, dict):
            raise Unusable("a message is not an object")
        speaker = turn.get("role", turn.get("from"))
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise Unusable(f"unknown speaker {str(speaker)[:20]!r}")
        messages.append({"role": ROLES[speaker], "content": _content(turn)})
    return messages


def _content(turn: dict[str, Any]) -> str:
    content = turn.get("content", turn.get("value"))
    if content is None and turn.get("tool_calls"):
        return json.dumps([call.get("function", call) for call in turn["tool_calls"]], ensure_ascii=False)
    if isinstance(content, list):  # OpenAI's content parts
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Unusable("a message with something other than text")
        return "".join(as_text(part.get("text"), "message") for part in content)
    return as_text(content, "message")


def as_text(value: Any, what: str) -> str:
    """`value` if it is a string. Raises Unusable."""
    if not isinstance(value, str):
        raise Unusable(f"{what} is not a string")
    return value


def check_turns(messages: list[Message]) -> None:
    """A system message only at the front, and no speaker but a tool twice in a row: a chat template would merge or
    refuse them. (An assistant may speak twice around a tool's answer.)"""
    for index, message in enumerate(messages):
        if message["role"] == "system":
            if index:
                raise Unusable("a system message after the first turn")
        elif index and message["role"] == messages[index - 1]["role"] and message["role"] != "tool":
            raise Unusable(f"two {message['role']} turns in a row")

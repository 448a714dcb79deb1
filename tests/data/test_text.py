"""Conversations in every form that people publish, and rows that are none."""

import json

import pytest

from bildung.data.rows import Unusable
from bildung.data.text import conversation, conversations, document, documents

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, [SYSTEM, USER, ANSWER, USER, ANSWER]),
        ({"messages": [{**SYSTEM, "role": "developer"}, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [USER, ANSWER]),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
                "system": "Be brief",
            },
            [SYSTEM, USER, ANSWER],
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, [USER, ANSWER]),
        ({"instruction": "Hi", "output": "Hello", "system": "Be brief"}, [SYSTEM, USER, ANSWER]),
        (
            {"instruction": "Add", "input": "1 + 1", "output": "2", "history": [["Hi", "Hello"]]},
            [USER, ANSWER, {"role": "user", "content": "Add\n\n1 + 1"}, {"role": "assistant", "content": "2"}],
        ),
        ({"prompt": "Hi", "completion": "Hello"}, [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    ],
)
def test_forms(row, messages):
    assert conversation(row) == messages


def test_tools_are_kept():
    turns = [
        {"from": "human", "value": "Time?"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "Noon."},
    ]
    tools = json.dumps([{"name": "clock"}])
    messages = conversation({"conversations": turns, "tools": tools})
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[0]["tools"] == tools


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "prose"}, "no known conversation keys"),
        ({"messages": "Hi"}, "messages are not a list"),
        ({"messages": []}, "no messages"),
        ({"messages": ["Hi"]}, "a message is not an object"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown speaker 'narrator'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown speaker"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "message is not a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "other than text"),
        ({"messages": [USER]}, "no assistant answer"),
        ({"messages": [ANSWER]}, "an answer without a question"),
        ({"messages": [SYSTEM, ANSWER]}, "an answer without a question"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty answer"),
        ({"messages": [USER, USER, ANSWER]}, "two user turns in a row"),
        ({"messages": [USER, SYSTEM, ANSWER]}, "system message after the first turn"),
        ({"instruction": " ", "input": "", "output": "x"}, "empty instruction"),
        ({"instruction": "x", "output": None}, "output is not a string"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, "history is not a list"),
    ],
)
def test_unusable_rows(row, reason):
    with pytest.raises(Unusable, match=reason):
        conversation(row)


def test_unusable_rows_are_counted_with_their_place(tmp_path):
    path = tmp_path / "c.jsonl"
    lines = [{"messages": [USER, ANSWER]}, {"messages": [USER]}, {"text": "prose"}, {"messages": [USER, ANSWER]}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\nbroken")
    found = conversations(str(path))
    assert len(list(found)) == 2
    assert found.places["no assistant answer"] == ["c.jsonl:2"] and found.places["not JSON"] == ["c.jsonl:5"]
    assert sum(found.dropped.values()) == 3
    assert len(list(conversations(str(path), limit=1))) == 1


def test_limit_counts_usable_rows(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"a": 1}, {"text": "x"}, {"a": 1}, {"text": "y"}]))
    assert list(documents(str(path), limit=2)) == ["x", "y"]


def test_documents():
    chapters = list(documents("mini:moby"))
    assert len(chapters) == 30 and chapters[0].startswith("Call me Ishmael.")
    for row, reason in [({"a": 1}, "no text"), ({"text": 3}, "not a string"), ({"text": " \n"}, "empty text")]:
        with pytest.raises(Unusable, match=reason):
            document(row)


def test_mini_conversations_are_all_usable():
    for name, count in [("chat", 48), ("instructions", 63)]:
        found = conversations(f"mini:{name}")
        assert len(list(found)) == count and not found.dropped

"""Preference pairs and thumbs in every form that people publish."""

import pytest

from bildung.data.pairs import Pair, Thumb, kto_rows, pair, preference_pairs, thumb
from bildung.data.rows import Unusable

SYSTEM, USER = {"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}
GOOD, BAD = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "Go away"}
HUMAN = {"from": "human", "value": "Hi"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, [USER]),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away", "system": "Be brief"}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, USER]),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER]),
        ({"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, [USER, BAD, USER]),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        (
            {
                "conversations": [{"from": "system", "value": "Be brief"}, HUMAN],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "Go away"},
            },
            [SYSTEM, USER],
        ),
        ({"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go away"}, [USER]),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Who?\n\nHuman: Hi\n\nAssistant: Hello",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Who?\n\nHuman: Hi\n\nAssistant: Go away",
            },
            [USER, {"role": "assistant", "content": "Who?"}, USER],
        ),
    ],
)
def test_pair_forms(row, prompt):
    assert pair(row) == Pair(prompt, "Hello", "Go away")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "Hello"}, "no chosen and rejected"),
        ({"chosen": "Hello", "rejected": "Go away"}, "there is no prompt"),
        ({"prompt": "Hi", "chosen": "Same", "rejected": "Same"}, "chosen equals rejected"),
        ({"prompt": "Hi", "chosen": " ", "rejected": "x"}, "empty answer"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "answer different prompts"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "does not end in a question"),
        ({"chosen": [USER], "rejected": [USER]}, "does not end in an answer"),
        ({"prompt": "Other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "is not the question"),
        ({"prompt": "Hi", "chosen": 1, "rejected": 2}, "not a list"),
        ({"prompt": [USER, GOOD], "chosen": "Hello", "rejected": "Go away"}, "two assistant turns"),
    ],
)
def test_unusable_pairs(row, reason):
    with pytest.raises(Unusable, match=reason):
        pair(row)


@pytest.mark.parametrize(
    ("row", "desirable"),
    [
        ({"prompt": "Hi", "completion": "Hello", "label": True}, True),
        ({"messages": [USER, GOOD], "label": False}, False),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "Hello"}], "kto_tag": 1}, True),
        ({"prompt": "Hi", "completion": "Hello", "label": "False"}, False),
    ],
)
def test_thumb_forms(row, desirable):
    assert thumb(row) == Thumb([USER], "Hello", desirable)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, "no label"),
        ({"prompt": "Hi", "completion": "Hello", "label": 0.7}, "neither true nor false"),
        ({"messages": [USER], "label": True}, "no assistant answer"),
    ],
)
def test_unusable_thumbs(row, reason):
    with pytest.raises(Unusable, match=reason):
        thumb(row)


def test_mini_sets_are_all_usable():
    pairs, thumbs = preference_pairs("mini:preferences"), kto_rows("mini:thumbs")
    assert len(list(pairs)) == len(list(thumbs)) == 43 and not pairs.dropped and not thumbs.dropped
    assert any(pair.prompt[0]["role"] == "system" for pair in pairs) and any(len(pair.prompt) > 2 for pair in pairs)
    assert sum(thumb.desirable for thumb in thumbs) == 22

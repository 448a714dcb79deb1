"""What is learned: masks, truncation, and what is left out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bildung.core.errors import ChatTemplateError, DataError
from bildung.data.examples import Example, chat_examples, clm_examples, last_run, num_targets, pair_examples
from bildung.data.pairs import Pair, preference_pairs
from bildung.data.text import conversations
from tests.data.conftest import CHATML, make_tokenizer

CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello"},  # the question's very words: a search would find the wrong ones
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


def targets(tokenizer, example):
    """The runs of targets as text."""
    runs, open_run = [], []
    for token, learned in zip([*example.tokens, None], [*example.loss_mask, False], strict=True):
        if learned:
            open_run.append(token)
        elif open_run:
            runs.append(tokenizer.decode(open_run))
            open_run = []
    return runs


def test_chat_learns_answers_with_their_end_of_turn(tokenizer):
    (example,) = chat_examples(tokenizer, [CHAT], 1000)
    assert targets(tokenizer, example) == ["Hello<|im_end|>", "See you<|im_end|>"]
    assert example.tokens.count(tokenizer.bos_id) == 1 and example.tokens[0] == tokenizer.bos_id
    # pad is the same token as end-of-turn here, and is learned all the same (TRL#1623)
    assert tokenizer.pad_id == tokenizer.eos_id
    assert num_targets([example]) == len("Hello") + 1 + len("See you") + 1


def test_chat_truncation_keeps_the_start_and_drops_what_has_no_target(tokenizer):
    whole = chat_examples(tokenizer, [CHAT], 1000)[0]
    first_target = whole.loss_mask.index(True)
    examples = chat_examples(tokenizer, [CHAT, [*CHAT[:1], {"role": "assistant", "content": "A"}]], first_target + 2)
    assert [len(example) for example in examples] == [first_target + 2] * 2
    assert examples.truncated == 1, "the second lost only the newline after its last target"
    assert examples[0].tokens == whole.tokens[: first_target + 2]

    long_question = [{"role": "user", "content": "x" * 500}, CHAT[1]]
    examples = chat_examples(tokenizer, [long_question, CHAT], 100)
    assert len(examples) == 1 and examples.dropped == {"no target left": 1}
    assert "1 no target left" in examples.notes[0]
    with pytest.raises(DataError, match=r"no example to train on.*Raise max_length"):
        chat_examples(tokenizer, [long_question], 100)


def test_unusable_rows_reach_the_notes(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"prompt": "a", "completion": "b"}\n')
    examples = chat_examples(tokenizer, conversations(str(path)), 100)
    assert len(examples) == 1 and "no assistant answer (c.jsonl:1)" in examples.notes[0]


def test_conversations_that_the_template_refuses_are_counted():
    strict = make_tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    examples = chat_examples(strict, [CHAT, [{"role": "system", "content": "s"}, *CHAT]], 1000)
    assert len(examples) == 1
    ((reason, count),) = examples.dropped.items()
    assert count == 1 and "no system" in reason
    with pytest.raises(ChatTemplateError):
        chat_examples(make_tokenizer(None), [CHAT], 1000)


def test_pairs_learn_the_judged_answer_alone(tokenizer):
    pair = Pair(CHAT[:3], "See you", "Go")
    (example,) = pair_examples(tokenizer, [pair], 1000)
    assert targets(tokenizer, example.chosen) == ["See you<|im_end|>"]
    assert targets(tokenizer, example.rejected) == ["Go<|im_end|>"]
    assert num_targets([example]) == 8 + 3
    prompt = example.chosen.loss_mask.index(True)
    assert example.chosen.tokens[:prompt] == example.rejected.tokens[:prompt]


def test_a_pair_goes_when_one_side_has_no_target(tokenizer):
    short, long = Pair(CHAT[:1], "yes", "no"), Pair([{"role": "user", "content": "x" * 99}], "yes", "no")
    examples = pair_examples(tokenizer, [short, long], 60)
    assert len(examples) == 1 and examples.dropped == {"no target left": 1}


def test_mini_pairs_all_fit(tokenizer):
    examples = pair_examples(tokenizer, preference_pairs("mini:preferences"), 2000)
    assert len(examples) == 43 and not examples.notes


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), max_length=st.integers(2, 40))
def test_every_token_of_prose_is_a_target_once(text, max_length):
    tokenizer = make_tokenizer()
    tokens = [*tokenizer.encode(text), tokenizer.eos_id]
    pieces = clm_examples(tokenizer, [text], max_length)
    learned = [token for piece in pieces for token, target in zip(piece.tokens, piece.loss_mask, strict=True) if target]
    assert learned == tokens[1:] and all(2 <= len(piece) <= max_length for piece in pieces)
    assert num_targets(pieces) == len(tokens) - 1


def test_last_run():
    assert last_run([False, True, False, True, True, False]) == [False, False, False, True, True, False]
    assert last_run([False, False]) == [False, False]
    assert last_run([True]) == [True]


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [([1, 2], [False], "mask of 1"), ([], [], "0 tokens"), ([1, 2], [True, True], "first token")],
)
def test_impossible_examples(tokens, mask, message):
    with pytest.raises(DataError, match=message):
        Example(tokens, mask)


def test_max_length_of_one(tokenizer):
    with pytest.raises(DataError, match="max_length = 1"):
        clm_examples(tokenizer, ["text"], 1)
    with pytest.raises(DataError, match="no texts"):
        clm_examples(tokenizer, [], 10)

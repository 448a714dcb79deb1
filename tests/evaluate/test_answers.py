"""Answers: independent of the batch, cut at stop strings."""

from __future__ import annotations

from bildung.evaluate.answers import answers, chat_prompt, cut


def test_answers_do_not_depend_on_the_other_prompts(tiny_lm):
    prompts = [tiny_lm.tokenizer.encode(text) for text in ("The capital", "It is Madrid, in the middle.", "x")]
    alone = [answers(tiny_lm, [prompt], 5)[0] for prompt in prompts]
    assert answers(tiny_lm, prompts, 5) == answers(tiny_lm, prompts, 5, rows=1) == alone
    assert len(set(alone)) == 3


def test_ids_beyond_the_tokenizer_have_no_text(tiny_lm):
    """The vocabulary of 320 is padded: the tokenizer knows 300 tokens."""
    tiny_lm.model.model.embed_tokens.weight.data[310] *= 100
    assert answers(tiny_lm, [tiny_lm.tokenizer.encode("x")] * 2, 3) == ["", ""]


def test_a_stop_string_ends_an_answer(tiny_lm):
    prompt = tiny_lm.tokenizer.encode("The capital")
    whole = answers(tiny_lm, [prompt], 12)[0]
    stop = whole[3]
    assert answers(tiny_lm, [prompt], 12, until=[stop])[0] == whole[: whole.index(stop)]


def test_cut():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["two"]) == cut("one", []) == "one"


def test_chat_prompts(tiny_lm):
    tokens = chat_prompt(tiny_lm.tokenizer, "Hello")
    assert tiny_lm.tokenizer.decode(tokens).endswith("Hello<|im_end|>\n<|im_start|>assistant\n")
    tiny_lm.tokenizer.chat_template = None
    assert chat_prompt(tiny_lm.tokenizer, "Hello") == tiny_lm.tokenizer.encode("Hello")

"""[CLS] a [SEP] b [SEP] as the transformers tokenizers make it."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bildung.core.errors import TokenizerError
from bildung.tokens.frames import encode_sentence, frame_of, shares
from bildung.tokens.tokenizer import Tokenizer

WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "b": 6, "c": 7, "d": 8, "e": 9}
NAMED = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}


def tokenizer(processor: object | None, named: dict[str, str] = NAMED) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    if processor is not None:
        backend.post_processor = processor
    return Tokenizer(backend, named)


PROCESSORS = {
    "bert": processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "roberta": processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "template": processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    ),
    "t5": processors.TemplateProcessing(single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 3)]),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_equals_transformers(name: str) -> None:
    ours = tokenizer(PROCESSORS[name])
    peer = PreTrainedTokenizerFast(tokenizer_object=tokenizer(PROCESSORS[name]).backend, **NAMED)
    frame = frame_of(ours)
    for first, second in (("a b c", None), ("a b", "d e c"), ("a x", "b")):
        expected = peer(first, second, return_token_type_ids=True)
        made = encode_sentence(ours, frame, first, second, 100)
        assert (made.tokens, made.types) == (expected["input_ids"], expected["token_type_ids"])


def test_without_a_post_processor_it_is_bert_s() -> None:
    ours = tokenizer(None)
    made = encode_sentence(ours, frame_of(ours), "a b", "c", 100)
    assert made.tokens == [2, 5, 6, 3, 7, 3] and made.types == [0, 0, 0, 0, 1, 1]
    with pytest.raises(TokenizerError, match="cls_token and sep_token"):
        frame_of(tokenizer(None, {"unk_token": "[UNK]"}))


def test_text_that_looks_like_a_separator_is_text() -> None:
    ours = tokenizer(PROCESSORS["bert"])
    assert encode_sentence(ours, frame_of(ours), "a [SEP] b", None, 100).tokens.count(3) == 1


def test_cut_to_length() -> None:
    ours = tokenizer(PROCESSORS["bert"])
    frame = frame_of(ours)
    assert encode_sentence(ours, frame, "a b c d e", None, 5).tokens == [2, 5, 6, 7, 3]
    assert encode_sentence(ours, frame, "a b c d e", None, 6, "middle").tokens == [2, 5, 7, 8, 9, 3]
    assert encode_sentence(ours, frame, "a b c", None, 6, "middle").tokens == [2, 5, 6, 7, 3]
    made = encode_sentence(ours, frame, "a", "a b c d e", 7)
    assert made.tokens == [2, 5, 3, 5, 6, 7, 3] and made.types == [0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(TokenizerError, match="no room"):
        encode_sentence(ours, frame, "a", None, 2)


def test_shares_are_those_of_shortening_the_longer_one_step_by_step() -> None:
    def slow(first: int, second: int, room: int) -> tuple[int, int]:
        while first + second > room:
            if first > second:
                first -= 1
            else:
                second -= 1
        return first, second

    cases = [(a, b, room) for a in range(9) for b in range(9) for room in range(2, 12)]
    assert all(shares(*case) == slow(*case) for case in cases)

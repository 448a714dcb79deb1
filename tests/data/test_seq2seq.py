"""Source and target rows: what stands around them, what is cut, what a batch holds."""

import json

import pytest
import tokenizers
import torch
from tokenizers import processors

from bildung.core.errors import DataError, TokenizerError
from bildung.data.seq2seq import (
    Seq2SeqExample,
    SourceTarget,
    encode_source,
    joined,
    pad_seq2seq,
    pairs,
    seq2seq_examples,
    text_frame,
)
from bildung.tokens.tokenizer import Tokenizer
from tests.data.conftest import make_tokenizer

START = 7


def with_processor(single):
    """The byte tokenizer with a post-processor that frames a text, as T5's and BART's do."""
    plain = make_tokenizer()
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    specials = [(name, plain.id_of(name)) for name in ("<s>", "<|im_end|>")]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=specials)
    return Tokenizer(backend, plain.config)


def test_rows_are_read_and_unusable_ones_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    given = [
        {"source": "ab", "target": "c"},
        {"source": "ab"},
        {"source": " ", "target": "c"},
        {"source": "ab", "target": 5},
    ]
    path.write_text("\n".join(map(json.dumps, given)))
    read = pairs(str(path))
    assert list(read) == [SourceTarget("ab", "c")]
    assert dict(read.dropped) == {"no target": 1, "empty source": 1, "target is not a string": 1}


def test_two_sources_are_joined_by_a_key(tmp_path):
    english, spanish = tmp_path / "en.jsonl", tmp_path / "es.jsonl"
    english.write_text('{"verse": 1, "text": "light"}\n{"verse": 2, "text": "day"}\n{"text": "?"}\n')
    spanish.write_text('{"verse": 3, "text": "noche"}\n{"verse": 1, "text": "luz"}\n')
    read = joined(str(english), str(spanish), "verse")
    assert list(read) == [SourceTarget("light", "luz")]
    assert sum(read.dropped.values()) == 2 and "no verse" in read.dropped
    spanish.write_text('{"verse": 1, "text": "noche"}\n{"verse": 1, "text": "luz"}\n')
    with pytest.raises(DataError, match="two rows"):
        joined(str(english), str(spanish), "verse")


def test_t5s_frame(tokenizer):
    """<start> target </s>; source </s>."""
    t5 = with_processor("$A <|im_end|>")
    eos = t5.eos_id
    (example,) = seq2seq_examples(t5, [SourceTarget("ab", "c")], START, 16)
    assert example.source == [*t5.encode("ab", bos=False), eos] == encode_source(t5, "ab")
    assert example.target.tokens == [START, *t5.encode("c", bos=False), eos]
    assert example.target.loss_mask == [False, True, True]


def test_barts_frame_and_a_start_token_that_is_its_bos():
    bart = with_processor("<s> $A <|im_end|>")
    bos, eos = bart.bos_id, bart.eos_id
    letter = bart.encode("c", bos=False)
    (example,) = seq2seq_examples(bart, [SourceTarget("c", "c")], eos, 16)
    assert example.source == [bos, *letter, eos]
    assert example.target.tokens == [eos, bos, *letter, eos]
    (example,) = seq2seq_examples(bart, [SourceTarget("c", "c")], bos, 16)
    assert example.target.tokens == [bos, *letter, eos]


def test_without_a_post_processor_a_text_ends_with_eos(tokenizer):
    frame = text_frame(tokenizer)
    assert (frame.before, frame.after) == ((tokenizer.bos_id,), (tokenizer.eos_id,))
    without_eos = Tokenizer(tokenizer.backend, {"bos_token": "<s>"})
    with pytest.raises(TokenizerError, match="eos_token"):
        text_frame(without_eos)
    with pytest.raises(DataError, match="empty"):
        encode_source(tokenizer, "")


def test_what_is_too_long_is_cut_and_counted():
    t5 = with_processor("$A <|im_end|>")
    examples = seq2seq_examples(t5, [SourceTarget("abcdef", "xyz"), SourceTarget("ab", "x")], START, 4, 3)
    assert examples.truncated == 1
    assert "1 of 2 examples truncated" in examples.notes[0]
    assert examples[0].source == [*t5.encode("abc", bos=False), t5.eos_id]  # a source ends as the encoder expects
    assert examples[0].target.tokens == [START, *t5.encode("xy", bos=False)]  # a target does not end where it is cut
    assert examples[1].target.tokens[-1] == t5.eos_id
    with pytest.raises(DataError, match="no room"):
        seq2seq_examples(t5, [SourceTarget("ab", "x")], START, 1)


def test_a_batch_keeps_explicit_masks():
    t5 = with_processor("$A <|im_end|>")
    made = seq2seq_examples(t5, [SourceTarget("abcde", "x"), SourceTarget("a", "xyz")], START, 16)
    batch = pad_seq2seq(made, pad_id=t5.eos_id, multiple=1)  # the padding id is a real token too
    assert batch.source_BS.shape == (2, 6) and batch.target.tokens_BL.shape == (2, 5)
    assert batch.source_keep_BS.sum(1).tolist() == [6, 2]
    assert batch.num_targets == 2 + 4
    assert batch.num_tokens == 8 + 3 + 5
    assert not batch.target.loss_mask_BL[:, 0].any()
    moved = batch.to("meta")
    assert moved.source_BS.is_meta and moved.source_keep_BS.is_meta and moved.target.tokens_BL.is_meta
    assert torch.equal(pad_seq2seq(made, None).source_keep_BS[:, :6], batch.source_keep_BS)


def test_an_empty_source_is_refused(tokenizer):
    with pytest.raises(DataError, match="empty source"):
        Seq2SeqExample([], seq2seq_examples(tokenizer, [SourceTarget("a", "b")], START, 8)[0].target)

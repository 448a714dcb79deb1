"""Prefixes of prose and of pairs, packed and padded."""

from bildung.data.batches import pack
from bildung.data.prefix_lm import pad_prefix, prefix_examples, source_prefix_examples
from bildung.data.seq2seq import SourceTarget


def test_prose_is_divided_at_random_places(tokenizer):
    examples = prefix_examples(tokenizer, ["abcdefgh"] * 400, 32, seed=0)
    lengths = {example.loss_mask.index(True) for example in examples}
    assert lengths == set(range(1, 10))  # BOS abcdefgh EOS: 10 tokens
    assert all(example.loss_mask == sorted(example.loss_mask) for example in examples)
    assert examples == prefix_examples(tokenizer, ["abcdefgh"] * 400, 32, seed=0)


def test_a_source_is_the_prefix_of_its_target(tokenizer):
    pairs = [SourceTarget("ab", "xyz"), SourceTarget("abcdefghijk", "x")]
    examples = source_prefix_examples(tokenizer, pairs, 8)
    assert len(examples) == 1 and "1 no target left" in " ".join(examples.notes)
    eos = tokenizer.eos_id
    assert examples[0].tokens == [*tokenizer.encode("ab"), eos, *tokenizer.encode("xyz", bos=False), eos]
    assert examples[0].loss_mask == [False] * 4 + [True] * 4


def test_batches_mark_the_prefixes(tokenizer):
    examples = source_prefix_examples(tokenizer, [SourceTarget("a", "xy"), SourceTarget("ab", "x")], 16)
    padded = pad_prefix([[example] for example in examples], None, packed=False, multiple=1)
    assert padded.prefix_BL.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    packed = pad_prefix(pack(examples, 12), None, packed=True, multiple=1)
    assert packed.prefix_BL.int().tolist() == [[1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]]
    assert packed.num_targets == padded.num_targets == 5 and packed.num_tokens == 12
    assert packed.to("meta").prefix_BL.is_meta

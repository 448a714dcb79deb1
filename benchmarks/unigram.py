"""Unigram vocabularies learned by bildung and by the `tokenizers` library: tokens per word of the same held-out text.

python benchmarks/unigram.py mini:moby 1000
python benchmarks/unigram.py nursery:kjv 8000
"""

from __future__ import annotations

import json
import sys
import time

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from bildung.tokenizer.corpus import Corpus
from bildung.tokenizer.learn import CUT, learn
from bildung.tokenizer.learning import Learning
from bildung.tokenizer.measure import measure
from bildung.tokens.tokenizer import Tokenizer


def library(corpus: Corpus, size: int) -> Tokenizer:
    """The library's trainer on the same words."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(Regex(CUT), "isolated")
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(corpus.training, trainer)
    return Tokenizer(made, {"unk_token": "<unk>"})


def main() -> None:
    """Learns three vocabularies of the same size, BPE beside the two, and prints what they make of held-out text."""
    source, size = sys.argv[1], int(sys.argv[2])
    corpus = Corpus([source])
    specials = {"unk": "<unk>"}
    ways = {
        "bildung": lambda: (
            learn(corpus.training, Learning(algorithm="unigram", vocab_size=size, specials=specials)).tokenizer
        ),
        "tokenizers": lambda: library(corpus, size),
        "bpe": lambda: learn(corpus.training, Learning(algorithm="bpe", vocab_size=size, specials=specials)).tokenizer,
    }
    for name, way in ways.items():
        start = time.monotonic()
        tokenizer = way()
        seconds = round(time.monotonic() - start, 1)
        tokens = round(measure(tokenizer, corpus.held_out).tokens_per_word, 4)
        print(json.dumps({"way": name, "source": source, "size": size, "tokens_per_word": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()

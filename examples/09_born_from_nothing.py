"""A model from nothing: a config, random weights, one small objective, the one training loop, an ordinary directory.

python examples/09_born_from_nothing.py /tmp/born
"""

import sys

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers

import bildung
from bildung.data.batches import Shuffled, clm_examples, pad
from bildung.data.text import documents
from bildung.model.config import from_dict
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import adamw

torch.manual_seed(0)
texts = list(documents("mini:moby"))[:3]
backend = tokenizers.Tokenizer(tokenizers.models.BPE())
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
special = ["<|end|>"]
backend.train_from_iterator(
    texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
)
tokenizer = Tokenizer(backend, {"eos_token": "<|end|>", "pad_token": "<|end|>"})

config = from_dict(
    {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
)
model = bildung.build(config, seed=0)
examples = clm_examples(tokenizer, texts, max_length=64)
batches = Shuffled(examples, 16, 0, lambda rows: pad(rows, tokenizer.pad_id))
history = fit(model, batches, clm, adamw(model, 3e-3), steps=30, clip=1.0)
print(f"loss {history.rows[0]['loss']:.2f} -> {history.rows[-1]['loss']:.2f} nats per token")

lm = bildung.LanguageModel(model, tokenizer, config)
bildung.save(lm, sys.argv[1])
print(bildung.generate(bildung.load(sys.argv[1]), "The whale", new_tokens=12))

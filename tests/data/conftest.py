"""A byte-level tokenizer of 259 tokens with ChatML: every byte is a token, so lengths can be counted by eye."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from bildung.tokens.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(template=CHATML):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "add_bos_token": True}
    return Tokenizer(backend, config, template)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()

"""Small models whose every dimension has another size, for tests of the model code."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.model.transformer import Decoder
from bildung.tokens.tokenizer import Tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_decoder(**changes: Any) -> Decoder:
    """Random float32 weights, always the same."""
    raw = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    return build(from_dict(raw), seed=3).eval()


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    """Token ids of shape (batch, length)."""
    return torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_lm(**changes: Any) -> LanguageModel:
    """A decoder with a byte-level tokenizer: 256 bytes, <bos>, <eos>, <pad>."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(backend, {**named, "tokenizer_class": "PreTrainedTokenizerFast"})
    ids = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    model = tiny_decoder(**{**ids, **changes})
    return LanguageModel(model, tokenizer, model.config)

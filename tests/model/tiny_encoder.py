"""A small encoder with a WordPiece tokenizer, for tests of what stands on encoders."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.tokens.tokenizer import Tokenizer

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMED = {f"{name.strip('[]').lower()}_token": name for name in SPECIALS}
LETTERS = "abcdefghijklmnopqrstuvwxyz.,!?"
WORDS = "the cat dog sat ran on mat big small red saw a and night day".split()
CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def wordpiece() -> Tokenizer:
    """Whole words, letters, and ##letters."""
    pieces = [*SPECIALS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *(word for word in WORDS if len(word) > 1)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(list(SPECIALS))
    return Tokenizer(backend, NAMED)


def tiny_encoder(architecture: str = "BertForPreTraining", **changes: Any) -> LanguageModel:
    """A BERT with random float32 weights, always the same."""
    tokenizer = wordpiece()
    raw = {**CONFIG, "architectures": [architecture], "vocab_size": tokenizer.vocab_size, **changes}
    config = from_dict(raw)
    return LanguageModel(build(config, seed=3).eval(), tokenizer, config)

"""A tiny language model for every test that needs a whole one: random float32 weights, byte-level BPE, ChatML."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

import bildung
from bildung.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bildung.model.store import LanguageModel

# A second thread costs tiny models more than it gains, and on a busy machine ten times as much.
torch.set_num_threads(1)

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is Rome.",
    "system You are a helpful assistant. user What is the capital of Spain? assistant It is Madrid, in the middle.",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE over all 256 bytes and a few merges; 0 is BOS and end of text, 1 and 2 delimit turns."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    config = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "pad_token": SPECIALS[2]}
    return Tokenizer(backend, config, chat_template=CHATML)


@pytest.fixture(scope="session", autouse=True)
def no_disk_is_waited_for() -> Iterator[None]:
    """No test cuts the power, and a process that is killed loses nothing that it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def what_was_imported_is_no_garbage() -> None:
    """Every operation begins with a collection (core/hardware.py), which would look through all that peers bring along:
    a quarter of a second, more than most tests take."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_lm_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face directory. Read only: it is shared by all tests."""
    from bildung.model.build import build
    from bildung.model.config import from_dict
    from bildung.model.store import LanguageModel

    config = from_dict(CONFIG)
    lm = LanguageModel(build(config, seed=3).eval(), tiny_tokenizer(), config)
    return bildung.save(lm, tmp_path_factory.mktemp("tiny") / "lm")


@pytest.fixture
def tiny_lm(tiny_lm_directory: Path) -> LanguageModel:
    """The tiny model, loaded anew for each test."""
    return bildung.load(tiny_lm_directory)


@pytest.fixture(autouse=True)
def without_predictions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that a training will take is predicted by a step on paper, which takes longer than most tests here
    train, and what a recipe's step will take in a process of its own: only tests marked `predicts`, and those that
    start processes themselves, have it done."""
    if request.node.get_closest_marker("predicts") is None:
        monkeypatch.setattr("bildung.train.training.predict", lambda *given: None)
        monkeypatch.setattr("bildung.app.ahead.Ahead.of", lambda *given: contextlib.nullcontext())

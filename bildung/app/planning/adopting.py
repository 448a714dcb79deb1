"""The plan of `adopt`: a model is read, written, and with a card read again and measured.

a directory    its files are mapped; what changes its type is beside them
model.gguf     its file, mapped; all of its tensors in float32, until each has its type; the largest once more
with a card    the model as it was adopted, the one that was written, and what the card measures on that
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bildung.app.planning.measuring import card_passes
from bildung.app.planning.passes import Look, Pass
from bildung.app.planning.reading import tokenizers_bytes
from bildung.core.errors import SettingsError
from bildung.model.config import from_dict
from bildung.model.count import on_paper
from bildung.model.gguf_file import hf_config, read_gguf
from bildung.model.store import DTYPES, LanguageModel, load
from bildung.tokens.gguf_tokenizer import tokenizer_from_gguf
from bildung.train.ledger import without_numbers


def adopt_passes(look: Look) -> list[Pass]:
    """`adopt`, of what lies on this machine."""
    given, path = look.given, look.source.expanduser()
    if path.suffix == ".onnx":
        raise SettingsError(f"{path}: what reading an ONNX file takes is not planned.")
    if path.suffix == ".gguf":
        lm = _from_gguf(look, path, DTYPES[given.dtype] if given.dtype else torch.float32)
    else:
        lm = look.read(path, given.dtype)
    held = sum(one.nbytes for one in {id(one): one for one in lm.model.parameters()}.values())
    found = card_passes(look, given.card)
    adopted = {} if look.parts else {"weights": held}  # of a GGUF file nothing stays but the model
    again = {"weights, as they were written": held, "their tokenizer": tokenizers_bytes([lm.tokenizer])}
    return [dataclasses.replace(one, beside={**adopted, **again, **one.beside}) for one in found]


def _from_gguf(look: Look, path: Path, dtype: torch.dtype) -> Any:
    """The model on paper. It is not loaded: that is what is planned."""
    gguf = read_gguf(path)
    config = from_dict(hf_config(gguf))
    numbers = [torch.Size(one.shape).numel() for one in gguf.tensors.values()]
    look.later |= {
        "the file, mapped": path.stat().st_size,
        "its tensors in float32": 4 * sum(numbers),
        "the largest of them, as it is made": 4 * max(numbers),
    }
    model = without_numbers(on_paper(config).to(dtype).eval())
    lm = LanguageModel(model, tokenizer_from_gguf(gguf.metadata), config, None, path, base=path)
    look.lms.append(lm)
    look.loaders.append(partial(load, path, str(dtype).removeprefix("torch.")))
    return lm

"""The plan of operations that write text: generate and chat.

They hold the model, its matrices packed, keys and values of the whole context, and the activations of the prompt. Files
are mapped: their bytes are the weights'. What is computed is counted on paper, as for training (train/ledger.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bildung.core.errors import SettingsError, nearest
from bildung.model.config import read_config
from bildung.model.count import cache_bytes, count, on_paper, totals
from bildung.model.linear import Dense
from bildung.model.safetensors_file import read_tensors
from bildung.model.store import LanguageModel, load
from bildung.tokens.chat_template import encode_chat
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.ledger import Ledger, paper_of, without_numbers
from bildung.train.plan import HOLES

BITS = {"int8": 8.0, "nf4": 4.127}  # of a quantized weight (model/quantized.py)
OPERATIONS = ("generate", "chat")
GIVEN: Mapping[str, Mapping[str, Any]] = {
    "generate": {"rows": 1, "prompt": 512, "new_tokens": 64},
    "chat": {"rows": 1, "prompt": 512, "new_tokens": 64},
}


@dataclasses.dataclass(frozen=True)
class Use:
    """What an operation holds at its fullest moment, part by part."""

    parameters: int
    flops_per_token: int  # of a forward pass
    parts: dict[str, int]
    length: int

    @property
    def peak_bytes(self) -> int:
        """The most that is there at a time."""
        return sum(self.parts.values())


def use(operation: str, source: Path, given: Mapping[str, Any], runtime: int) -> Use:
    """The plan of one of OPERATIONS. Raises SettingsError for a setting that no plan depends on."""
    known = GIVEN[operation]
    for name in given:
        if name not in known:
            hint = nearest(name, known) or f"there are: {', '.join(known)}"
            raise SettingsError(f"{name!r} says nothing about the memory of {operation!r}; {hint}")
        check_value(name, given[name])
    asked = {**known, **given}
    base = base_of(source)
    config, file = read_config(base), file_bytes(base)
    limit = getattr(config, "max_position_embeddings", None) or 2**62
    if config.kind in ("encoder", "classifier", "vision"):
        raise SettingsError(f"{source} is a {config.model_type} of kind {config.kind!r}, which does not write.")
    if given.get("prompt", 1) > limit:
        raise SettingsError(f"prompt = {given['prompt']} was given; the model reads at most {limit} tokens.")
    length = asked["prompt"] = min(asked["prompt"], limit)
    model = on_paper(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stored = round(file / max(1, parameters))  # bytes of a weight
    dtype = torch.float32 if stored == 4 else torch.bfloat16
    context = min(asked["prompt"] + asked["new_tokens"], limit)
    parts = {
        "weights": file,
        "packed matrices": packed_bytes(lm.model if (lm := _quantized(base, config)) else model, dtype.itemsize),
        "keys and values": asked["rows"] * cache_bytes(config, context, dtype.itemsize),
        **computed(model, asked["rows"], length, dtype),
    }
    _, multiply_adds = totals(count(model, length))
    held = {name: int(bytes_) for name, bytes_ in parts.items() if bytes_}
    return Use(parameters, round(2 * multiply_adds / length), {**held, "runtime": runtime}, length)


def asked_in(prompts: Sequence[str], new_tokens: int, source: Path) -> dict[str, Any]:
    """The settings of a plan of `chat` with these prompts, every answer as long as it may be."""
    tokenizer = Tokenizer.load(base_of(source))
    messages = [{"role": role, "content": text} for one in prompts for role, text in (("user", one), ("assistant", ""))]
    read = len(encode_chat(tokenizer, messages[:-1], add_generation_prompt=True))
    return {"prompt": read + (len(prompts) - 1) * new_tokens, "new_tokens": new_tokens}


def _quantized(base: Path, config: Any) -> LanguageModel | None:
    """The model, if it is quantized: which matrices are, stands in its files."""
    return load(base) if "quantization_config" in config.raw else None


def using_less(operation: str, given: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """Settings that take less, the smallest change first. length: of the prompt that was planned."""
    asked = {**GIVEN[operation], **given, "prompt": length}
    found: list[dict[str, Any]] = []
    while asked["rows"] > 1:
        asked = {**asked, "rows": asked["rows"] // 2}
        found.append(asked)
    while asked["prompt"] > 128:
        asked = {**asked, "prompt": asked["prompt"] // 2}
        found.append(asked)
    return found


def check_value(name: str, value: Any) -> None:
    """Raises SettingsError for a value that no plan can be made with."""
    if not isinstance(value, int) or value < 1:
        raise SettingsError(f"{name} = {value!r} was given; it must be a number of at least 1.")


def base_of(source: Path) -> Path:
    """The directory of the full weights: of an adapter, its base."""
    from bildung.model import adapter_file

    if (source / adapter_file.CONFIG).exists():
        return Path(adapter_file.find_base(source, adapter_file.read_config(source)))
    if not (source / "config.json").exists():
        raise SettingsError(f"{source} holds no model (no config.json); `bildung adopt` makes a directory of one.")
    return source


def file_bytes(directory: Path) -> int:
    """Bytes of all tensors in a directory's safetensors files; they are mapped, not read."""
    if (directory / "adapter_model.safetensors").exists():
        return (directory / "adapter_model.safetensors").stat().st_size
    return sum(tensor.nbytes for _, tensor in read_tensors(directory))


def packed_bytes(model: Any, item: int) -> int:
    """The second copy of the matrices that decoding keeps on a CPU (model/packed.py)."""
    dense = [one for one in model.linears().values() if isinstance(one.base, Dense)]  # quantized ones stay as they are
    return item * sum(one.in_features * one.out_features for one in dense)


def computed(model: Any, rows: int, length: int, dtype: torch.dtype) -> dict[str, int]:
    """Activations of a forward pass that nothing is learned from, and the logits of its last states."""
    if model.config.kind not in ("decoder", "encoder", "recurrent"):
        return {}
    paper = without_numbers(model)
    paper.eval()
    paper.compute_dtype = dtype
    ledger = Ledger(lambda tensor: "activations", paper_of(paper))
    tokens_BL = torch.zeros(rows, length, dtype=torch.long)
    with torch.no_grad(), ledger:
        paper.hidden(tokens_BL)
    logits = min(rows * length * model.config.vocab_size, 2**23) * (4 + dtype.itemsize)
    return {"activations": int(ledger.fullest.total() * (1 + HOLES)), "logits": logits}

"""Model directories: ordinary Hugging Face files in, ordinary Hugging Face files out.

A directory holds config.json, safetensors, the tokenizer's files, and a record.json when an operation made it. Files
are hostile until checked: no pickle, no remote code; every tensor must be expected, of the right shape, and finite.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bildung.core import ranks
from bildung.core.errors import ConfigError, ModelFileError, OutputError, SettingsError, nearest
from bildung.core.record import Record, damage, hash_directory, read_record
from bildung.core.staging import check_name
from bildung.model import adapter_attached, adapter_file, adapter_head, attachments, names, onnx_file, quantized_file
from bildung.model.assemble import assemble
from bildung.model.config import BaseConfig, from_dict, read_config
from bildung.model.gguf_file import hf_config, hf_state_dict, read_gguf
from bildung.model.linear import Dense, Linear
from bildung.model.nf4 import QUANT_STATE
from bildung.model.quantized_file import DTYPES
from bildung.model.safetensors_file import read_tensors, write_tensors
from bildung.model.virtual import virtual_of
from bildung.tokens.gguf_tokenizer import tokenizer_from_gguf
from bildung.tokens.tokenizer import Tokenizer

BESIDE = (  # of a model's directory: kept when it is saved
    "generation_config.json",
    "preprocessor_config.json",
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
)


class NoTokenizer:
    """What stands for the tokenizer of a model that reads no text: any use of it says so."""

    def __init__(self, model_type: str):
        self.model_type = model_type

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy, pickle and the like ask every object for
            raise AttributeError(name)
        raise ModelFileError(f"a {self.model_type} reads images; it has no tokenizer.")


@dataclass
class LanguageModel:
    """A model with everything needed to use it. `base`: the directory of its full weights (of an adapter: its base).

    A model of images has no tokenizer; `tokenizer` is then a NoTokenizer.
    """

    model: Any  # a kind of Model (see base.py)
    tokenizer: Tokenizer
    config: Any  # a kind of BaseConfig
    record: Record | None = None
    path: Path | None = None
    base: Path | None = None

    @property
    def added(self) -> list[str]:
        """What was added to the base and is saved apart from it, in words; empty for a plain model."""
        kinds = {
            "deltas": any(linear.deltas for linear in self.model.linears().values()),
            "retrained parameters": bool(self.model.retrained),
            "virtual tokens": virtual_of(self.model) is not None,
            "attached modules": self.attached_apart,
        }
        return [kind for kind, there in kinds.items() if there]

    @property
    def attached_apart(self) -> bool:
        """Modules are attached, and not a part of the base's own directory."""
        return bool(self.model.attached) and self.base != self.path


def load(
    path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> LanguageModel:
    """A model from a Hugging Face directory, a PEFT adapter directory (with its base), a .gguf or an .onnx file.

    dtype: float32, bfloat16 or float16 for the unquantized weights; default: as stored. device: default: this process's
    GPU where there is one, or what the environment's BILDUNG_DEVICE says. Raises ModelFileError and its kinds, naming
    the file and what is wrong with it; TokenizerError when the tokenizer does not fit the model.
    """
    lm = _load(path, dtype)
    lm.model.to(ranks.device() if device is None else torch.device(device))
    return lm


def _load(path: str | Path, dtype: str | torch.dtype | None) -> LanguageModel:
    path = Path(path).expanduser()
    dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"dtype {dtype!r} is not known; allowed: {', '.join(DTYPES)}. {nearest(dtype, DTYPES)}")
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.suffix == ".onnx":
        return _load_onnx(path, dtype)
    if not path.is_dir():
        raise ModelFileError(
            f"{path} is neither a model directory nor a .gguf or .onnx file; `bildung adopt` fetches models."
        )
    record = _sound_record(path)
    if (path / adapter_file.CONFIG).exists():
        base = adapter_file.find_base(path, adapter_file.read_config(path))
        return adapted(_load(base, dtype), path)
    config = read_config(path)
    tokenizer = no_tokenizer(config) if config.kind == "vision" else Tokenizer.load(path)
    if config.kind != "vision":
        tokenizer.check_fits(config.vocab_size)
    try:
        model = assemble(config, dict(read_tensors(path)), dtype)
    except ModelFileError as error:
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from None
    attachments.read(model, path)
    return LanguageModel(model, tokenizer, model.config, record, path, base=path)


def adapted(lm: LanguageModel, path: Path) -> LanguageModel:
    """The base `lm` with the adapter of a directory put into it. Raises ModelFileError and its kinds."""
    record, settings = _sound_record(path), adapter_file.read_config(path)
    if lm.base is not None:
        warn_of_another_base(path, record, lm.base)
    lm = replace(lm, model=adapter_head.with_place(lm.model, settings))
    adapter_file.add_to(lm.model, path, settings)
    return replace(lm, config=lm.model.config, record=record, path=path)


def _sound_record(path: Path) -> Record | None:
    """The directory's record. Raises ModelFileError when its files are not those that the record was written for."""
    record = read_record(path)
    if record is not None and (harm := damage(path, record)):
        raise ModelFileError(f"{path}: {harm} since its record was written; make it again, or delete its record.json.")
    return record


def no_tokenizer(config: BaseConfig) -> Tokenizer:
    """The stand-in of a model that reads no text."""
    return cast(Tokenizer, NoTokenizer(config.model_type))


def warn_of_another_base(path: Path, record: Record | None, base: Path) -> None:
    """A base that changed under its adapter still fits by its shapes; only its hash tells. Warns, naming both."""
    trained_on = record and (record.companions.get("base") or record.source)
    if trained_on and trained_on["hash"] != (found := hash_directory(base)):
        warnings.warn(
            f"{base} is not what the adapter {path} was trained on: its files have changed since (hash {found[:12]}, "
            f"then {trained_on['hash'][:12]}). If its weights have, make the adapter again.",
            stacklevel=3,
        )


def _load_gguf(path: Path, dtype: str | None) -> LanguageModel:
    gguf = read_gguf(path)
    config = from_dict(hf_config(gguf))
    tokenizer = tokenizer_from_gguf(gguf.metadata)
    tokenizer.check_fits(config.vocab_size)
    return LanguageModel(assemble(config, hf_state_dict(gguf), dtype), tokenizer, config, path=path)


def _load_onnx(path: Path, dtype: str | None) -> LanguageModel:
    graph = onnx_file.read_onnx(path)
    config = from_dict(onnx_file.hf_config(graph))
    model = assemble(config, onnx_file.hf_state_dict(graph), dtype)
    return LanguageModel(model, no_tokenizer(config), model.config, path=path)


def save(lm: LanguageModel, path: str | Path) -> Path:
    """Write a directory that `transformers` (for a model carrying deltas: `peft`) loads; returns it.

    Written beside `path` and renamed when whole. Raises OutputError when `path` already holds something or cannot be
    written.
    """
    path = Path(path).expanduser()
    check_name(path)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise OutputError(f"{path} already holds something; give a new place.")
    partial = path.with_name(f".{path.name}.saving")  # not ".partial", where an operation keeps its checkpoints
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(lm, partial)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from error
    return path


def write_model(lm: LanguageModel, directory: Path) -> None:
    """Write a model's files into `directory`: an adapter when something was added to it, else all of its weights."""
    if ranks.rank() > 0:  # of several processes one writes
        return
    if not isinstance(lm.tokenizer, NoTokenizer):
        lm.tokenizer.save(directory)
    if lm.attached_apart:
        write_attached(lm, directory)
        return
    if adapter_file.is_adapted(lm.model):
        _check_base(lm)
        adapter_file.write(lm.model, directory, base=lm.base)
        return
    if not lm.config.raw:
        raise ConfigError("this model's config has no config.json behind it; build it with config.from_dict(...).")
    dtype = str(lm.model.weight_dtype).removeprefix("torch.")
    raw = {k: v for k, v in lm.config.raw.items() if k not in ("torch_dtype", "quantization_config")}
    raw |= {"dtype": dtype, "architectures": [names.architecture(lm.config)]}
    if (start := getattr(lm.config, "decoder_start_token_id", None)) is not None:
        raw["decoder_start_token_id"] = start  # a default of ours is not always that of others
    if (described := quantized_file.described(lm.model, DTYPES[dtype])) is not None:
        raw["quantization_config"] = described
    (directory / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, beside in ((name, lm.base / name) for name in BESIDE) if lm.base is not None else ():
        if beside.exists():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(beside, directory / name)
    write_tensors(state_tensors(lm.model), directory)
    attachments.write(lm.model, directory)


def write_attached(lm: LanguageModel, directory: Path) -> None:
    """Write what is attached to the model, and norms that are no longer the base's, as an adapter directory."""
    if ranks.rank() > 0:
        return
    if not isinstance(lm.tokenizer, NoTokenizer):
        lm.tokenizer.save(directory)
    adapter_attached.write(lm.model, directory, lm.base, _changed(lm))


def _check_base(lm: LanguageModel) -> None:
    """An adapter keeps what was added alone. Raises OutputError when the rest is not what lies in the base's place."""
    kept = {names.place_of(name, names.places(lm.config))[0] for name in lm.model.retrained}
    for name in _changed(lm):
        if name not in kept:
            raise OutputError(
                f"{name} is no longer what {lm.base} holds, and an adapter on that base would leave the change out. "
                f"Save the changed model without its deltas, load it, and add them there."
            )


def _changed(lm: LanguageModel) -> dict[str, Tensor]:
    """The tensors (names of the file) in which the model differs from its base's directory."""
    if lm.base is None or not (lm.base / "config.json").exists():
        return {}
    own, there = state_tensors(lm.model), dict(read_tensors(lm.base))
    own, there = adapter_head.without_head(lm.model, own), adapter_head.without_head(lm.model, there)
    names.complete(there, lm.config)
    changed = {}
    for name, stored in there.items():
        needless = name not in own and any(fnmatch(name, known) for known in names.repeated(lm.config))
        if name.endswith(QUANT_STATE) or needless:
            continue
        if name not in own or not torch.equal(stored.to(own[name].dtype), own[name]):
            changed[name] = own.get(name, stored)
    return changed


def state_tensors(model: Any) -> dict[str, Tensor]:
    """Tensors under the family's names: stores as their formats want them, a tied head once, no deltas.

    Quantized parts of a fused matrix lie side by side, which no other library reads. transformers would draw the matrix
    at random and go on; so a tensor without numbers stands under its name, at whose shape it stops.
    """
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    table = names.places(model.config)
    for name, module in model.named_modules():
        if name.startswith("attached") or ".deltas" in name or ".virtual" in name or name.endswith(".base"):
            continue
        if isinstance(module, Linear) and not (name == "lm_head" and model.config.tie_word_embeddings):
            if isinstance(module.base, Dense):
                tensors[f"{name}.weight"] = module.base.weight
            else:
                place = names.quantized_place(name, table)
                stored.update({f"{place}.{suffix}": t for suffix, t in module.base.tensors().items()})
                if name in table and names.is_reshaped(table[name]):
                    stored[f"{table[name].name}.weight"] = torch.empty(0)
        for leaf, parameter in module.named_parameters(recurse=False):
            tensors[f"{name}.{leaf}" if name else leaf] = parameter
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return {
        **names.to_file(tensors, model.config),
        **{name: t.detach().cpu().contiguous() for name, t in stored.items()},
    }

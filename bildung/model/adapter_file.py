"""Adapters on disk in PEFT's format: adapter_config.json + adapter_model.safetensors.

    peft_type   what the tensors are                                 read and written by
    LORA        low-rank factors, with DoRA's magnitudes             adapter_lora.py
    IA3         factors of features                                  adapter_ia3.py
    BITFIT      biases, whole (our own; peft has no such type)       adapter_bitfit.py
    INTRINSIC   a few numbers and seeds (our own)                    adapter_intrinsic.py
    PROMPT_TUNING, PREFIX_TUNING   virtual tokens                    adapter_prompt.py, adapter_prefix.py
    ATTACHED    modules at activation sites (our own)                adapter_attached.py

What `peft` writes is read here, and `peft` reads what is written here, with equal logits. Names and shapes are those of
the family's files (see adapter_names.py). A directory holds one type, so a model with deltas of two types is refused
before it is trained: merge one of them first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from bildung.core.errors import AdapterError, OutputError, nearest
from bildung.core.json_file import read_object
from bildung.model import (
    adapter_attached,
    adapter_bitfit,
    adapter_head,
    adapter_ia3,
    adapter_intrinsic,
    adapter_lora,
    adapter_prefix,
    adapter_prompt,
)
from bildung.model.linear import linears
from bildung.model.safetensors_file import write_file
from bildung.model.virtual import virtual_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Each has: WHAT it is in words, DELTAS, the classes of deltas it can write; REQUIRED, the config's keys that change the
# numbers, with the only values that are built here (the first is that of an absent key); INERT, its other keys;
# check(config, path); add_to(model, path, config, name); holds(model); parts(model) -> the config's keys, the tensors.
TYPES: dict[str, ModuleType] = {
    "LORA": adapter_lora,
    "IA3": adapter_ia3,
    "BITFIT": adapter_bitfit,
    "INTRINSIC": adapter_intrinsic,
    "PROMPT_TUNING": adapter_prompt,
    "PREFIX_TUNING": adapter_prefix,
    "ATTACHED": adapter_attached,
}
# Keys that say how training went, where things lie, or what the tensors' own names and shapes say again.
INERT = set(
    "peft_type base_model_name_or_path task_type inference_mode revision auto_mapping target_modules exclude_modules "
    "peft_version modules_to_save "
    "fan_in_fan_out".split()  # peft looks at the layer itself, and says so when the two disagree
)
# The class of peft that opens the adapter with a head for its task; None: the plain one.
TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, every key accounted for. Raises AdapterError."""
    path = directory / CONFIG
    given = read_object(path, AdapterError)
    kind = given.get("peft_type", "LORA")
    if kind not in TYPES:
        raise AdapterError(
            f"{path}: peft_type = {kind!r} is not supported; allowed: {', '.join(TYPES)}. {nearest(str(kind), TYPES)}"
        )
    required, inert = TYPES[kind].REQUIRED, INERT | TYPES[kind].INERT
    for key, value in given.items():
        allowed = required.get(key)
        if allowed is not None and value not in allowed:
            raise AdapterError(f"{path}: {key} = {value!r} is not supported; allowed: {allowed[0]!r}.")
        if allowed is None and key not in inert and value not in (None, False, {}, []):
            raise AdapterError(f"{path}: unknown key {key!r} = {value!r}. {nearest(key, inert | set(required))}")
    whole = given.get("modules_to_save") or []
    if not isinstance(whole, list) or any(one not in adapter_head.MODULES for one in whole):
        raise AdapterError(
            f"{path}: modules_to_save = {whole!r}; of the base's own modules, an adapter may hold those of a text "
            f"classifier's head: {', '.join(adapter_head.MODULES)}."
        )
    if not isinstance(given.get("base_model_name_or_path"), str | None):
        raise AdapterError(
            f"{path}: base_model_name_or_path = {given['base_model_name_or_path']!r}; it must be a path."
        )
    TYPES[kind].check(given, path)
    return given


def find_base(directory: Path, settings: dict[str, Any]) -> Path:
    """The base model's directory: where the config says, or, when the life was moved, its sibling of that name."""
    named = settings.get("base_model_name_or_path") or ""
    for place in (Path(named), directory / named, directory.parent / Path(named).name):
        if named and (place / "config.json").exists():
            return place
    raise AdapterError(
        f"{directory / CONFIG} names the base model {named!r}, which is not a model directory here; "
        f"put it there, or say where it is: bildung relink {directory} BASE"
    )


def add_to(model: Any, directory: Path, settings: dict[str, Any], name: str = "default") -> None:
    """Put the adapter into `model`, its deltas under `name`. Raises AdapterError when it does not fit."""
    TYPES[settings.get("peft_type", "LORA")].add_to(model, directory / TENSORS, settings, name)


def is_adapted(model: Any) -> bool:
    """Whether the model is written as an adapter: it carries deltas, or parameters that an adapter holds."""
    return any(linear.deltas for linear in linears(model).values()) or any(t.holds(model) for t in TYPES.values())


def check_place(model: Any, base: Path | None) -> Path:
    """The base. Raises OutputError when what this model carries could not be saved as an adapter."""
    if base is None:
        raise OutputError("an adapter is saved as an addition to a base model on disk; save the base model first.")
    if model.attached:
        sites = ", ".join(key.replace("/", ".") for key in model.attached)
        raise OutputError(
            f"modules are attached to this model ({sites}), and an adapter has no place for them. Detach them "
            f"(bildung.detach), or train all parameters (tune full, align dpo --full)."
        )
    _type_of(model)
    return base


def _type_of(model: Any) -> str | None:
    """The one type that this model's adapter is of; None for a model without. Raises OutputError for two."""
    writable = tuple(kind for one in TYPES.values() for kind in one.DELTAS)
    for name, linear in linears(model).items():
        for delta in linear.deltas.values():
            if not isinstance(delta, writable):
                raise OutputError(f"{name} carries a {type(delta).__name__}, which no adapter file holds; delete it.")
    found = [name for name, one in TYPES.items() if one.holds(model)]
    if len(found) > 1:
        raise OutputError(
            f"this model carries {' and '.join(TYPES[name].WHAT for name in found)}, and an adapter directory holds "
            f"one type. `bildung merge` the first into its base, and add the other to the result."
        )
    return found[0] if found else None


def write(model: Any, directory: Path, base: Path | None) -> None:
    """Write all that `model` carries beside its base as one adapter directory.

    Raises OutputError when it has no such form, a delta is switched off, or the base has no place of its own on disk.
    """
    base, kind = check_place(model, base), _type_of(model)
    if kind is None:
        raise OutputError("this model carries nothing that an adapter holds; save it as a model.")
    for name, linear in linears(model).items():
        if len(linear.enabled_deltas()) < len(linear.deltas):
            raise OutputError(f"{name} carries a delta that is switched off; switch it on or delete it first.")
    config, tensors = TYPES[kind].parts(model)
    if virtual_of(model) is None:  # whose file has its head already, under other names
        head, own = adapter_head.parts(model, adapter_head.DELTAS_PREFIX)
        config, tensors = {**config, **head}, {**tensors, **own}
    config = {
        "peft_type": kind,
        "task_type": TASKS.get(model.config.kind),
        "base_model_name_or_path": os.path.abspath(base),
        **config,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if config["task_type"] == "SEQ_CLS":
        adapter_head.write(model, directory)
    write_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, directory / TENSORS)

"""Which module reads an adapter directory: adapter_config.json says by its `peft_type`.

    PROMPT_TUNING, PREFIX_TUNING    virtual tokens        virtual_file.py
    BILDUNG_BOTTLENECK              attached modules      attachments.py
    all others                      deltas on matrices    adapter_file.py

All three have `read_config(directory)` and `add_to(model, directory, settings)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from bildung.model import adapter_file, virtual_file

KINDS = {
    virtual_file.PROMPT: virtual_file,
    virtual_file.PREFIX: virtual_file,
}


def reader(directory: Path) -> ModuleType:
    """The module for an adapter directory; what cannot be read is left to it to complain about."""
    try:
        given = json.loads((directory / adapter_file.CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return adapter_file
    kind = given.get("peft_type") if isinstance(given, dict) else None
    return KINDS.get(kind, adapter_file) if isinstance(kind, str) else adapter_file


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, whatever kind of adapter it is. Raises AdapterError."""
    settings: dict[str, Any] = reader(directory).read_config(directory)
    return settings


def base_of(directory: Path) -> Path:
    """The directory of the model that an adapter was made for. Raises AdapterError."""
    return adapter_file.find_base(directory, read_config(directory))

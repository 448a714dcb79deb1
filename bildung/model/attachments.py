"""Saving modules attached at activation sites: attachments.safetensors (what they learned) and attachments.json (what
they are). Only classes of this package are rebuilt, by name; nothing else in the file is ever imported or run.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from bildung.core.errors import ModelFileError, OutputError
from bildung.model.safetensors_file import read_file, write_file
from bildung.model.taps import Attachment, attach
from bildung.model.transformer import Decoder

SETTINGS, TENSORS = "attachments.json", "attachments.safetensors"


def write(model: Decoder, directory: Path) -> None:
    """Write what is attached to `model`; nothing when nothing is."""
    if not model.attached:
        return
    described = {}
    for key, module in model.attached.items():
        kind = type(module)
        if not isinstance(module, Attachment) or kind.__module__.split(".")[0] != "bildung":
            raise OutputError(
                f"a {kind.__name__} is attached at {key.replace('/', '.')}; only Attachment classes of this package "
                f"can be saved, because a file may not name foreign code. Detach it first."
            )
        described[key.replace("/", ".")] = {"class": f"{kind.__module__}.{kind.__name__}", "settings": module.settings}
    (directory / SETTINGS).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.attached.state_dict().items()}
    write_file(tensors, directory / TENSORS)


def read(model: Decoder, directory: Path) -> None:
    """Attach again what `write` wrote."""
    path = directory / SETTINGS
    if not path.exists():
        return
    try:
        for site, one in json.loads(path.read_text(encoding="utf-8")).items():
            module_name, _, class_name = one["class"].rpartition(".")
            if not module_name.startswith("bildung."):
                raise ModelFileError(f"{path}: {one['class']!r} is not a class of this package.")
            kind = getattr(import_module(module_name), class_name)
            if not (isinstance(kind, type) and issubclass(kind, Attachment)):
                raise ModelFileError(f"{path}: {one['class']!r} is not an Attachment.")
            attach(model, site, kind(**one["settings"]))
        model.attached.load_state_dict(dict(read_file(directory / TENSORS)))
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} cannot be used: {error}") from error

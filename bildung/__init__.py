"""bildung: a language model's whole life on one readable PyTorch model code.

import bildung
lm = bildung.load("path/to/model")            # .model, .tokenizer, .config, .record
logits_BLV = lm.model(tokens_BL)
text = bildung.generate(lm, "prompt", new_tokens=32)
bildung.save(lm, "path/to/copy")

The names below are loaded when first used, so that `import bildung` and the command line start without torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# oneDNN, which multiplies bfloat16 on CPUs, keeps the code it made for each of the last 1024 shapes, and PyTorch keeps
# as many again: half a megabyte each, and batches of texts hardly have the same shape twice. Making it anew takes a
# third of a millisecond. Read when the first product is made; what is set already stays.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")

_HOMES = {
    "load": "bildung.model.store",
    "save": "bildung.model.store",
    "LanguageModel": "bildung.model.store",
    "build": "bildung.model.build",
    "sites": "bildung.model.taps",
    "observe": "bildung.model.taps",
    "intervene": "bildung.model.taps",
    "read_steering": "bildung.model.steering",
    "steered": "bildung.model.steering",
    "attach": "bildung.model.taps",
    "detach": "bildung.model.taps",
    "deltas_off": "bildung.model.linear",
    "add_adapter": "bildung.model.named_adapters",
    "use_adapters": "bildung.model.named_adapters",
    "adapters_by_row": "bildung.model.named_adapters",
    "generate": "bildung.run.generate",
    "embed": "bildung.run.embed",
}
__all__ = [*_HOMES]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bildung' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

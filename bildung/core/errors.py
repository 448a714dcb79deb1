"""Every error a user can meet.

    BildungError                    something the user can mend; printed without a traceback by the command line
    ├── SettingsError               a setting, recipe key or command line value is unknown or out of range
    ├── RecipeError                 a recipe's structure: a missing step, a cycle, an operation that does not exist
    ├── OutputError                 the place to write to: occupied by something else, not writable, disk full
    ├── RecordError                 a record.json that is missing, unreadable or contradicts its directory
    ├── ModelFileError              a model directory, safetensors or GGUF file that cannot be trusted or read
    │   ├── ConfigError             config.json: unknown architecture, unknown key, missing key, impossible value
    │   └── AdapterError            an adapter that does not belong to this model
    ├── TokenizerError              tokenizer.json that is broken or does not fit the model
    │   └── ChatTemplateError       a chat template that fails, loops, or tries to leave its sandbox
    ├── DataError                   data that cannot be used: empty, wrong shape, not UTF-8, unknown source
    ├── NoSuchSite                  no activation site matches the pattern
    ├── BadIntervention             an intervention changed shape or type, or a site is already taken
    ├── NoSuchLinear                no weight matrix matches the pattern
    └── TrainingError               nothing to train, zero trained tokens, loss is not a number

An error says what was given, what was allowed, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BildungError(Exception):
    """Base of all errors a user can mend."""


class SettingsError(BildungError, ValueError):
    """A setting is unknown, missing or out of range."""


class RecipeError(BildungError, ValueError):
    """A recipe cannot be run as written."""


class OutputError(BildungError, OSError):
    """The output place is occupied, not writable or full."""


class RecordError(BildungError, ValueError):
    """A record.json is missing, unreadable or contradicts its directory."""


class ModelFileError(BildungError, ValueError):
    """A model file cannot be trusted or read."""


class ConfigError(ModelFileError):
    """config.json names an unknown architecture or key, or lacks one."""


class AdapterError(ModelFileError):
    """An adapter does not belong to this model."""


class TokenizerError(BildungError, ValueError):
    """A tokenizer is broken or does not fit the model."""


class ChatTemplateError(TokenizerError):
    """A chat template fails, loops, or tries to leave its sandbox."""


class DataError(BildungError, ValueError):
    """Data that cannot be used."""


class NoSuchSite(BildungError, LookupError):
    """No activation site matches."""


class BadIntervention(BildungError, ValueError):
    """An intervention broke the contract of its site."""


class NoSuchLinear(BildungError, LookupError):
    """No weight matrix matches."""


class TrainingError(BildungError, RuntimeError):
    """Training cannot start or has gone wrong."""


def nearest(name: str, allowed: Iterable[str], limit: int = 3) -> str:
    """The allowed names closest to `name`, as a phrase for an error message ("" when none is close)."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(allowed)), n=limit, cutoff=0.5)
    if not close:
        return ""
    return "did you mean " + " or ".join(repr(c) for c in close) + "?"

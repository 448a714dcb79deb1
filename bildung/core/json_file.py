"""Reading a JSON file that must hold an object: one way to say what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bildung.core.errors import BildungError


def read_object(path: Path, error: type[BildungError], advice: str = "") -> dict[str, Any]:
    """The JSON object in `path`. Raises `error`, which says why it cannot be read, and `advice`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read as JSON: {reason}.{advice and f' {advice}'}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}; a JSON object is expected.")
    return value

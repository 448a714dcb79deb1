"""Plans for a recipe that is being lived: a line of JSON for every step, and one in answer (app/ahead.py asks).

    {"verb": "merge", "source": "life/tuned-lora", "values": {...}}    ->    {"parts": {"weights": 538060801, ...}}
                                                                             {"why": "life/tuned-lora holds no model"}

The parts are those that the step brings along; "runtime" is only what kernels take when they first run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from bildung.app.planning.live import step_parts
from bildung.core.errors import BildungError
from bildung.core.verbs import find, verbs


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """The parts, or why there are none."""
    try:
        source = None if asked["source"] is None else Path(asked["source"])
        return {"parts": step_parts(find(asked["verb"], verbs()), source, asked["values"], False, beside=True)}
    except (BildungError, OSError) as error:
        return {"why": str(error)[:300]}
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return {"why": f"it looks at numbers that are not there yet ({error})"}


def main() -> None:
    """Answer until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()

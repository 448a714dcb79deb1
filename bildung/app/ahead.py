"""What each step of a recipe will take, asked just before its work begins, of a process that plans (planning/asked.py).

Planning imports more than most steps need and builds models on paper; in the process that lives the recipe, all of that
would be in the peak that is measured. So a second process does it: started for the first step that asks, at rest while
steps run, gone with the recipe. It says what the step will bring along. What this process has already is known here:

    runtime     what it holds as the work begins, and what the kernels will take that have not run in it yet

Steps that train predict themselves (train/predict.py). Whatever cannot be planned is a note in the record.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import psutil

import bildung
from bildung.core import ranks
from bildung.core.foretold import Foretold, foretelling, say
from bildung.core.hardware import give_back_memory, memory_there_is
from bildung.core.recipe import Step

LONGEST = 300.0  # seconds that a plan may take
PLANNER = ("-m", "bildung.app.planning.asked")
TRAIN_OFTEN = ("tune intrinsic_dimension", "continual train")  # with the settings of one training
OF_ONE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's: the process that plans is no rank


class Ahead:
    """The process that plans, and what of this one's memory its plans need not count again."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors: TextIO | None = None
        self._kernels: float = 0  # bytes of kernels that have run here

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @contextlib.contextmanager
    def of(self, step: Step) -> Iterator[None]:
        """While the step runs: it is foretold of its operation what it will take, unless that predicts itself."""
        if ranks.rank() > 0:
            yield
        elif _predicts_itself(step):
            yield
            self._kernels = math.inf
        else:
            with foretelling(partial(self.foretold, step)):
                yield

    def foretold(self, step: Step, source: Path | None) -> Foretold:
        """The prediction, printed. source: where the operation has found what it starts from."""
        answer = self._answer(step, source)
        if "parts" not in answer:
            return Foretold(notes=(f"memory was not predicted: {answer['why']}",))
        parts: dict[str, int] = answer["parts"]
        kernels = parts.pop("runtime", 0)
        gc.collect()
        give_back_memory()
        parts["runtime"] = psutil.Process().memory_info().rss + int(max(0, kernels - self._kernels))
        self._kernels = max(self._kernels, kernels)
        peak = sum(parts.values())
        say(peak, parts, memory_there_is())
        return Foretold({"predicted_peak_bytes": peak, "predicted_parts": parts})

    def _answer(self, step: Step, source: Path | None) -> dict[str, Any]:
        """{"parts": {name: bytes}} or {"why": there are none}."""
        if step.verb.folder not in _own_folders():
            return {"why": f"{step.verb.name} is no verb of bildung itself, and has no plan"}
        if _on_accelerator():
            return {"why": "on an accelerator only training is planned"}
        process = self._started()
        timer = threading.Timer(LONGEST, process.kill)
        timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(request(step, source) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        return {"why": self._last_words()}

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            # It computes next to nothing, and must neither take the cores nor the accelerator of the step.
            environment = {name: value for name, value in os.environ.items() if name not in OF_ONE}
            environment |= {"OMP_NUM_THREADS": "1", "BILDUNG_DEVICE": "cpu"}
            self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, *PLANNER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=environment,
            )
        return self._process

    def _last_words(self) -> str:
        """Why the process ended."""
        assert self._process is not None and self._errors is not None
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        self._end()
        return f"planning ended with {said[-1][:300]}" if said else f"planning ended with exit code {code}"

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._errors):
                with contextlib.suppress(BrokenPipeError):  # what was to be written to one that is gone
                    if stream is not None:
                        stream.close()
        self._process = self._errors = None


def request(step: Step, source: Path | None) -> str:
    """What is asked, as a line of JSON."""
    values = step.settings(step.verb.load().Settings)
    return json.dumps({"verb": step.verb.name, "source": source or step.source, "values": values}, default=str)


def _predicts_itself(step: Step) -> bool:
    """Whether the operation is one training, which says what it will take."""
    settings = step.verb.load().Settings
    if "bildung.train.training" not in sys.modules:
        return False
    from bildung.train.training import Training

    return issubclass(settings, Training) and step.verb.name not in TRAIN_OFTEN


def _on_accelerator() -> bool:
    """Whether models go to one. Without torch there are none."""
    torch = sys.modules.get("torch")
    return torch is not None and ranks.device().type == "cuda"


def _own_folders() -> set[str]:
    """Of the verbs that come with bildung: others may stand beside it."""
    return {path.parent.name for path in Path(bildung.__file__).parent.glob("*/__init__.py")}

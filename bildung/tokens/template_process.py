"""The other end of `template_worker.py`: starts that process once, sends it work, and survives its death."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bildung.core.errors import ChatTemplateError
from bildung.tokens import template_worker

# One worker per process: a forked child must not read the answers to its parent's requests.
_workers: dict[int, subprocess.Popen[str]] = {}
_lock = threading.Lock()


def render_all(
    template: str, renders: Sequence[Mapping[str, Any]], environment: Literal["chat", "task"] = "chat"
) -> list[str]:
    """Renders `template` once for each set of variables. All of them share one time limit.

    Raises ChatTemplateError when the template fails, is stopped at a limit, or gets values that are not JSON.
    """
    name = "chat template" if environment == "chat" else "template"
    try:
        request = json.dumps({"environment": environment, "template": template, "renders": list(renders)})
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(
            f"messages and tools must be made of text, numbers, lists and objects as in JSON: {error}"
        ) from error
    with _lock:
        worker = _workers.get(os.getpid()) or _start()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # a worker that died says why in its exit status, below
                worker.stdin.write(request + "\n")
                worker.stdin.flush()
            line = worker.stdout.readline()
        except BaseException:
            # Interrupted between question and answer: the answer must not be taken for the next question's.
            _stop(worker)
            raise
        if not line:
            status = _stop(worker)
            raise ChatTemplateError(f"the {name} was stopped: {_reason(status)}. Use another {name}.")
    reply = json.loads(line)
    if "error" in reply:
        raise ChatTemplateError(f"{name}: {reply['error']}")
    texts: list[str] = reply["texts"]
    return texts


def _start() -> subprocess.Popen[str]:
    worker = subprocess.Popen(
        # -P: the worker's own folder stays off the import path, where its neighbours would shadow standard modules.
        [sys.executable, "-P", str(Path(template_worker.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C in the terminal is for us
    )
    _workers[os.getpid()] = worker
    return worker


def _stop(worker: subprocess.Popen[str]) -> int:
    """Ends the worker and returns its exit status."""
    _workers.pop(os.getpid(), None)
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.close()  # the worker leaves its loop
    try:
        return worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def _reason(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it ran for more than {template_worker.SECONDS:g} s of processor time"
    if status < 0:
        return f"its process ended with {signal.Signals(-status).name} (the stack or memory ran out)"
    return f"its process ended with status {status} (memory is limited to {template_worker.MEMORY // 2**20} MiB)"


def _stop_at_exit() -> None:
    if worker := _workers.get(os.getpid()):
        _stop(worker)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


atexit.register(_stop_at_exit)
os.register_at_fork(after_in_child=_after_fork)

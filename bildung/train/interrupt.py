"""Ctrl-C that waits for the end of a step: half an optimizer step is no state to go on from."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType


class CtrlC:
    """`with CtrlC() as ctrl_c:`; the first Ctrl-C sets `ctrl_c.pressed`, the second one interrupts at once."""

    pressed: bool = False

    def __enter__(self) -> CtrlC:
        # Python delivers signals to the main thread, and only that one may say what happens then.
        self._armed = threading.current_thread() is threading.main_thread()
        if self._armed:
            self._before = signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._armed:
            signal.signal(signal.SIGINT, self._before)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self._before)
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)

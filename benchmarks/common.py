"""Measuring on a shared machine: contenders take turns, each in a process of its own, and ratios are formed per round.

A slow minute then hits all of them. Wall time is what a user waits; time of the processors is what is left to compare
when other programs want them too. The machine's load is printed beside every figure.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Figures = dict[str, Any]


def timed(work: Callable[[], Any], repeats: int) -> Figures:
    """Median wall and processor seconds of `work`, after one warm-up, and the peak memory of this process in MB."""
    work()
    wall, processor = [], []
    for _ in range(repeats):
        start, start_processor = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": statistics.median(wall),
        "processor_seconds": statistics.median(processor),
        "peak_mb": round(peak),
        "load": round(os.getloadavg()[0], 1),
    }


def take_turns(
    script: str, contenders: Sequence[str], rounds: int, arguments: Sequence[str]
) -> list[dict[str, Figures]]:
    """`rounds` times the figures of every contender: the last line that `script --one CONTENDER` prints, as JSON."""
    found = []
    for number in range(1, rounds + 1):
        made: dict[str, Figures] = {}
        for contender in contenders:
            command = [sys.executable, script, *arguments, "--one", contender]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            made[contender] = json.loads(output.splitlines()[-1])
            shown = "  ".join(
                f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in made[contender].items()
                if not isinstance(value, list)
            )
            print(f"round {number}  {contender:28} {shown}", flush=True)
        found.append(made)
    return found


def ratio(rounds: Sequence[dict[str, Figures]], peer: str, ours: str, figure: str) -> tuple[float, float, float]:
    """Median, least and greatest over the rounds of peer's figure / ours: how many times less ours is."""
    each = [made[peer][figure] / made[ours][figure] for made in rounds]
    return statistics.median(each), min(each), max(each)

"""kill -9 at random moments: no more is lost than an interval, nothing is left unreadable, the end is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from bildung.core.record import read_record
from bildung.train.checkpoint import all_in, damage, step_of
from bildung.tune.lora import Settings, lora
from tests.processes import START

EVERY = 4


def tune(source: Path, out: Path, data: Path, steps: int, in_background: bool) -> None:
    """What is killed: a whole operation, with dropout, held-out losses, and the best checkpoint beside the newest."""
    lora(
        source,
        out,
        Settings(
            data=str(data),
            max_length=64,
            batch_size=2,
            steps=steps,
            learning_rate=3e-3,
            precision="fp32",
            dropout=0.1,
            held_out=2,
            evaluate_every=10,
            checkpoint_every=EVERY,
            keep_last=2,
            async_checkpoints=in_background,
        ),
    )


def steps_logged(out: Path) -> int:
    """The last step of which the log has a whole line."""
    try:
        lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


def killed_at_random(chance: random.Random, *arguments: object) -> tuple[int, bool]:
    """Run until some steps have been made and a little longer; (last step that was logged, whether it was still
    running)."""
    staging = Path(f"{arguments[1]}.partial")
    process = START.Process(target=tune, args=arguments)
    wanted = max(map(step_of, all_in(staging)), default=0) + chance.randint(1, 3 * EVERY)
    process.start()
    while steps_logged(staging) < wanted and process.is_alive():
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return steps_logged(staging), process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "kills, in_background",
    [(2, True), pytest.param(20, True, marks=pytest.mark.slow), pytest.param(20, False, marks=pytest.mark.slow)],
)
def test_kill_minus_nine_in_a_loop(tiny_lm_directory: Path, tmp_path: Path, kills: int, in_background: bool) -> None:
    data = tmp_path / "talks.jsonl"
    asked = [f"What is the capital of country {number}?" for number in range(9)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": f"It is {q[::-1]}"}] for q in asked]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    steps = 3 * EVERY * kills + 8  # a kill comes after three intervals at most
    tune(tiny_lm_directory, tmp_path / "whole", data, steps, in_background)
    chance, out, staging = random.Random(kills), tmp_path / "killed", tmp_path / "killed.partial"
    arguments = (tiny_lm_directory, out, data, steps, in_background)
    for _ in range(kills):
        logged, running = killed_at_random(chance, *arguments)
        assert running and not out.exists()
        places = all_in(staging)
        assert [damage(place) for place in places] == [""] * len(places)
        newest = step_of(places[-1]) if places else 0
        # The one being written at the moment does not count; without a thread there is none while steps are made.
        assert logged - newest <= (2 * EVERY if in_background else EVERY)
    tune(*arguments)
    assert read_record(out).measured["steps"] == steps
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes()
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[[json.loads(row).get(key) for key in ("step", "loss", "held_out_loss")] for row in one] for one in rows]
    assert losses[0] == losses[1] and len(losses[0]) == steps + 1

"""A watcher that says in words when a run overfits: the training loss falls while the held-out loss rises.

Neither alone says so. A held-out loss that rises with the training loss is a learning rate too high; a gap that does
not grow is the price of unseen text. Losses of single steps are noisy, so the training loss between two measurements is
the mean over the steps between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def overfitting(rows: Sequence[Mapping[str, Any]], measurements: int = 3) -> str | None:
    """A sentence when, at some point of the log, the held-out loss had been above its lowest and rising for so many
    measurements in a row while the training loss fell; None otherwise. rows: History.rows."""
    held, trained = _curves(rows)
    for end in range(measurements, len(held)):
        start = end - measurements
        rising = all(held[i + 1][1] > held[i][1] for i in range(start, end))
        falling = trained[end] < trained[start + 1]
        if rising and falling:
            best_step, best = min(held[: end + 1], key=lambda point: point[1])
            return (
                f"overfitting since about step {held[start][0]}: by step {held[end][0]} the held-out loss had risen "
                f"{measurements} times in a row, from {held[start][1]:.3f} to {held[end][1]:.3f}, while the training "
                f"loss fell from {trained[start + 1]:.3f} to {trained[end]:.3f}. Until then the best was "
                f"{best:.3f} at step {best_step}: stop there (patience), regularise, or give more data."
            )
    return None


def newly_overfitting(rows: Sequence[Mapping[str, Any]], measurements: int = 3) -> str | None:
    """The sentence, if the last row is what made it true: to be said once, while the run goes on."""
    if not rows or "held_out_loss" not in rows[-1] or overfitting(rows[:-1], measurements):
        return None
    return overfitting(rows, measurements)


def _curves(rows: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[int, float]], list[float]]:
    """((step, held-out loss) of each measurement, mean training loss of the steps since the one before)."""
    held: list[tuple[int, float]] = []
    trained: list[float] = []
    since: list[float] = []
    for row in rows:
        if "loss" in row:
            since.append(row["loss"])
        if "held_out_loss" in row:
            held.append((row["step"], row["held_out_loss"]))
            trained.append(sum(since) / len(since) if since else float("inf"))
            since = []
    return held, trained

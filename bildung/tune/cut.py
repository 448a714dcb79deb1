"""Cut a smaller rank out of an adapter that DyLoRA trained: `bildung tune cut ADAPTER OUT --rank 2`.

    alpha / b · B[:, :b] A[:b]         the first b ranks, scaled as they were when they trained

The result is an ordinary LoRA of rank b. A plain LoRA can be cut too, for comparison; its ranks are in no order and its
scaling stays, so the first b are a share of it and nothing more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bildung.core import ranks
from bildung.core.errors import AdapterError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model.linear import linears
from bildung.model.low_rank import LowRank
from bildung.model.store import load, write_model
from bildung.tune.dylora import NOTE
from bildung.tune.instruction import base_of
from bildung.tune.merge import check_is_adapter


@settings_class
class Settings:
    """Cutting an adapter."""

    rank: int  # how many ranks to keep


def cut(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Write the first ranks of an adapter as one of its own. Raises AdapterError, SettingsError."""
    source = Path(source)

    def work(job: Job) -> None:
        lm = load(source)
        alpha = alpha_of(source)
        kept = cut_ranks(lm.model, settings.rank, alpha)
        job.measured |= {"rank_before": kept, "rank_after": settings.rank}
        if alpha is None:
            job.notes.append("this adapter was not trained by DyLoRA: its ranks are in no order, the first are any")
            if ranks.rank() == 0:
                print(job.notes[-1])
        write_model(lm, job.out)

    check_is_adapter(source, "cut")
    return perform("tune cut", source, out, settings, work, companions=base_of(source), force=force)


def alpha_of(adapter: Path) -> float | None:
    """The alpha that an adapter's ranks were trained with, if they were trained apart. Raises AdapterError."""
    path = adapter / NOTE
    if not path.exists():
        return None
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read ({error!r}); make the adapter again.") from error


def cut_ranks(model: Any, rank: int, alpha: float | None) -> int:
    """Keep the first ranks of every low-rank delta, in place; scaled by alpha / rank, without alpha as before.

    Returns the largest rank there was. Raises SettingsError for a rank that some delta does not have.
    """
    deltas = [(name, key, d) for name, linear in linears(model).items() for key, d in linear.deltas.items()]
    if not deltas or not all(type(delta) is LowRank for _, _, delta in deltas):
        raise AdapterError("only adapters that are plain LoRAs have ranks to cut; this one holds something else.")
    most = max(delta.rank for _, _, delta in deltas if isinstance(delta, LowRank))
    for name, _, delta in deltas:
        assert isinstance(delta, LowRank)
        if not 1 <= rank <= delta.rank:
            raise SettingsError(f"rank = {rank} was given; {name} has 1 to {delta.rank}.")
        delta.lora_A = nn.Parameter(delta.lora_A[:rank].detach().clone())
        delta.lora_B = nn.Parameter(delta.lora_B[:, :rank].detach().clone())
        if alpha is not None:
            delta.scaling = alpha / rank
    return most

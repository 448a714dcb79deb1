"""How far back does a model learn? The gradient of one prediction's loss by the distance of the token it reaches.

    bildung look gradient_distance lives/lm/rnn OUT --against lives/lm/lstm lives/lm/transformer

    g(k) = |d(-log p(last token)) / d(vector of the token k before it)|      k = 0: the token read last

Through a recurrence of k steps the gradient is multiplied k times: it shrinks or grows like rate^k (train/bptt.py). The
`rate` fitted here is about 1 where every distance counts alike. OUT gets gradient_distance.png and .json.
"""

# B rows, L tokens read, E embedding size

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.look.lenses.lens import check_writes
from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.model.store import LanguageModel, load
from bildung.model.taps import observe
from bildung.train.objectives import surprisal


@settings_class
class Settings:
    """Gradients by distance."""

    against: tuple[Path, ...] = ()  # more models, drawn in the same picture
    data: str = "mini:moby"  # prose to read
    rows: int = 16  # stretches of text
    length: int = 100  # tokens of each


def gradient_distance(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the picture and the numbers. Raises DataError for too little text."""
    source = Path(source)
    places = {_name(place): place for place in (source, *settings.against)}

    def work(job: Job) -> None:
        norms: dict[str, list[float]] = {}
        rates: dict[str, float] = {}
        for name, place in places.items():
            lm = load(place, "float32")
            check_writes(lm)
            norms_L = gradient_norms(lm, stretches(lm, settings.data, settings.rows, settings.length))
            norms[name], rates[name] = norms_L.tolist(), rate(norms_L)
            job.tokens_seen += settings.rows * settings.length
            job.measured |= {f"{name}: rate": rates[name]}
        text = json.dumps({name: {"norms": norms[name], "rate": rates[name]} for name in norms})
        (job.out / "gradient_distance.json").write_text(text + "\n", encoding="utf-8")
        lines = {f"{name}, {rates[name]:.3f}": (range(settings.length), norms[name]) for name in norms}
        title = "gradient of the last token's loss, and its factor per token"
        draw_lines([Panel(title, "tokens back", lines, log_y=True)], job.out / "gradient_distance.png")

    companions = {f"against {name}": place for name, place in places.items() if place != source}
    return perform(
        "look gradient_distance",
        source,
        out,
        settings,
        work,
        data=fingerprint(settings.data),
        companions=companions,
        force=force,
    )


def stretches(lm: LanguageModel, data: str, rows: int, length: int) -> Tensor:
    """Stretches of text as token ids (rows, length + 1). Raises DataError when the text is too short."""
    ids: list[int] = []
    for text in documents(data):
        ids += lm.tokenizer.encode(text)
        if len(ids) >= rows * (length + 1):
            return torch.tensor(ids[: rows * (length + 1)]).view(rows, length + 1)
    raise DataError(
        f"{data} has {len(ids)} tokens, and {rows} rows of {length + 1} are wanted; lower rows or length, or give more."
    )


def gradient_norms(lm: LanguageModel, tokens_BL: Tensor) -> Tensor:
    """g(k) for k = 0, 1, ..., the geometric mean over the rows, each predicting its last token."""
    tokens_BL = tokens_BL.to(lm.model.device)
    with observe(lm.model, "embed") as seen:
        h_BLD = lm.model.hidden(tokens_BL[:, :-1])
        loss = surprisal(lm.model, h_BLD[:, -1], tokens_BL[:, -1]).sum()
    (gradient_BLE,) = torch.autograd.grad(loss, seen["embed"])
    norms_BL = gradient_BLE.double().norm(dim=-1).flip(1).cpu()
    return norms_BL.clamp_min(torch.finfo(torch.float32).tiny).log().mean(0).exp()


def rate(norms_L: Tensor) -> float:
    """The factor per token: the slope of a straight line through log g(k), k >= 1."""
    logs = norms_L[1:].log()
    distance = torch.arange(len(logs), dtype=logs.dtype)
    distance -= distance.mean()
    return float(((distance * logs).sum() / distance.square().sum()).exp())


def _name(place: Path) -> str:
    return Path(place).resolve().name

"""Train a tuned lens: one affine map per layer that lets the model's own unembedding read it (Belrose et al. 2023).

    bildung look tuned_lens SOURCE OUT --data nursery:brown --steps 250
    bildung look logit_lens SOURCE PAGE --tuned OUT --prompt "The capital of France is"

    loss_l = KL(final || lens_l), summed over positions, nats; the model itself is frozen

OUT gets tuned_lens.safetensors and .json with the hash of the weights it belongs to, and KL per layer on held-out text
before and after. The maps are in translators.py. All layers learn from the same pass; a step keeps the logits of
one layer and one stretch of positions at a time.
"""

# B rows, L positions, N positions that are read, D hidden_size, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.look.lenses.lens import check_has_lens, lens_logits
from bildung.look.lenses.translators import TunedLens, new_lens, write_lens
from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.model.store import LanguageModel, load
from bildung.model.taps import observe
from bildung.train.fit import fit
from bildung.train.loss import LossSum
from bildung.train.optim import schedule
from bildung.train.training import COMPUTE

CHUNK_ELEMENTS = 2**23  # logits alive at a time


@settings_class
class Settings:
    """A tuned lens."""

    data: str = "nursery:brown"  # prose to read
    steps: int = 250  # optimizer steps
    rows: int = 4  # pieces of text a step
    length: int = 128  # tokens of each piece
    positions: int | None = None  # of these so many, drawn anew each time, are read; default: all
    held_out: int = 8  # pieces to measure on, before and after
    optimizer: Literal["sgd", "adam"] = "adam"  # sgd: Nesterov's momentum 0.9, as in the paper
    learning_rate: float | None = None  # at the start, falling linearly; default: 1e-3 for adam, 0.1 for sgd
    weight_decay: float = 0.0  # pulls to the logit lens (published: 1e-3)
    clip: float | None = 1.0  # largest norm of the gradient
    precision: Literal["fp32", "bf16"] = "bf16"  # of the model's activations and logits; the maps are float32
    checkpoint_every: int = 50  # steps between checkpoints; a killed run goes on from the last
    seed: int = 0  # order of the text, and positions


@dataclass(frozen=True)
class Pieces:
    """Token ids BL, and the number of positions that are read."""

    tokens_BL: Tensor
    read: int
    number: int = 0

    def to(self, device: torch.device | str) -> Pieces:
        return Pieces(self.tokens_BL.to(device), self.read, self.number)

    @property
    def num_tokens(self) -> int:
        return self.tokens_BL.numel()

    @property
    def num_targets(self) -> int:
        return self.read


def tuned_lens(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train the maps and write them. Raises DataError for too little text or a model that does not continue text."""
    check(settings)

    def work(job: Job) -> None:
        lm = load(source)
        lens = train(job, lm, settings)
        write_lens(lens, job.out, {"data": settings.data, "steps": settings.steps})
        before, after = job.measured["kl_before"], job.measured["kl_after"]
        layers = list(range(len(before)))
        lines = {"logit lens": (layers, before), "tuned lens": (layers, after)}
        title = f"KL(final ‖ lens) on held-out text, {Path(source).name}"
        draw_lines([Panel(title, "layer", lines, y_label="nats")], job.out / "tuned_lens.png")
        for layer, (a, b) in enumerate(zip(before, after, strict=True)):
            print(f"layer {layer:3d}   KL {a:7.3f} -> {b:7.3f} nats")

    return perform("look tuned_lens", source, out, settings, work, data=fingerprint(settings.data), force=force)


def check(given: Settings) -> None:
    """Raises SettingsError for a number out of range."""
    for name in ("steps", "rows", "positions", "held_out"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise SettingsError(f"{name} = {value} was given; it must be at least 1.")
    if given.length < 2 or given.weight_decay < 0 or (given.learning_rate is not None and given.learning_rate <= 0):
        raise SettingsError("length is at least 2, weight_decay at least 0, learning_rate above 0.")


def train(job: Job, lm: LanguageModel, given: Settings) -> TunedLens:
    """A lens trained on the settings' text; fills in the job's numbers. The model is left as it was."""
    check_has_lens(lm)
    if hasattr(lm.model, "given"):
        raise DataError(
            f"a {lm.config.model_type} of kind {lm.config.kind!r} does not continue text, and a tuned lens is learned "
            "on running text; read its layers by the logit lens."
        )
    lens = new_lens(lm)
    trained_on, held_out = pieces(lm, given)
    before_type, lm.model.compute_dtype = lm.model.compute_dtype, COMPUTE[given.precision]
    lm.model.requires_grad_(False)
    lm.model.eval()
    if not len(lens.layers):
        raise DataError(f"{lm.path} has one layer, which the final norm reads already; there is nothing to translate.")

    def batch_at(number: int) -> Pieces:
        generator = torch.Generator().manual_seed(given.seed + number // per_epoch)
        order = torch.randperm(len(trained_on), generator=generator)
        start = number % per_epoch * given.rows
        rows_BL = trained_on[order[start : start + given.rows]]
        return Pieces(rows_BL, min(given.positions or rows_BL.numel(), rows_BL.numel()), number)

    per_epoch = max(1, len(trained_on) // given.rows)
    rate = given.learning_rate or {"adam": 1e-3, "sgd": 0.1}[given.optimizer]
    optimizer: torch.optim.Optimizer
    if given.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            lens.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=given.weight_decay
        )
    else:
        optimizer = torch.optim.Adam(lens.parameters(), rate, weight_decay=given.weight_decay)
    job.measured["kl_before"] = kl_by_layer(lm, lens, held_out)
    history = fit(
        lens, batch_at, objective(lm), optimizer, steps=given.steps, schedule=schedule("linear", given.steps, 0),
        clip=given.clip, seed=given.seed, out=job.out, checkpoint_every=given.checkpoint_every, title="look tuned_lens",
    )  # fmt: skip
    job.measured["kl_after"] = kl_by_layer(lm, lens, held_out)
    lm.model.compute_dtype = before_type
    job.tokens_seen, job.trained_tokens = history.tokens_seen, history.trained_tokens
    job.measured |= {"pieces": len(trained_on), "epochs": given.steps / per_epoch, "weights": lens.belongs_to}
    return lens


def objective(lm: LanguageModel) -> Callable[[TunedLens, Pieces], LossSum]:
    """KL(final || lens) summed over the layers that have a map, for each of the batch's positions: every map gets the
    gradient of its own layer's mean, whatever the number of layers."""

    def kl(lens: TunedLens, batch: Pieces) -> LossSum:
        streams, final_ND, chosen_N = _streams(lm, batch)
        read = [streams[layer].flatten(0, 1)[chosen_N] for layer in range(len(lens.layers))]
        slopes = [torch.empty_like(final_ND, dtype=torch.float32) for _ in read]
        value = torch.zeros((), device=final_ND.device)
        # Of the model's own log-probabilities one stretch exists at a time; each is compared with all layers.
        for rows, log_p_NV in _final(lm, final_ND):
            p_NV = log_p_NV.exp()
            value += torch.einsum("nv,nv->n", p_NV, log_p_NV).sum() * len(read)
            del log_p_NV
            for layer, h_ND in enumerate(read):
                with torch.no_grad():
                    leaf_ND = lens(h_ND[rows], layer)
                with torch.enable_grad():
                    logits_NV = lens_logits(lm.model, leaf_ND.requires_grad_())
                log_q_NV = logits_NV.detach().float().log_softmax(-1)
                value -= torch.einsum("nv,nv->n", p_NV, log_q_NV).sum()
                slope_NV = log_q_NV.exp_().sub_(p_NV).to(logits_NV.dtype)  # of KL(p || q): q - p, in the place of log q
                (slopes[layer][rows],) = torch.autograd.grad(logits_NV, leaf_ND, slope_NV)
                del logits_NV, log_q_NV, slope_NV
        # Its value is wrong and its gradient right. It is made when all logits are gone: what it keeps, small tensors,
        # would come to lie between theirs and leave holes that hold no others.
        surrogate = sum((lens(h_ND, layer).float() * slopes[layer]).sum() for layer, h_ND in enumerate(read))
        return LossSum(surrogate - surrogate.detach() + value, batch.read)

    return kl


@torch.no_grad()
def kl_by_layer(lm: LanguageModel, lens: TunedLens, tokens_BL: Tensor) -> list[float]:
    """Mean KL(final || lens) of every layer but the last, nats per position."""
    totals = torch.zeros(len(lens.layers), dtype=torch.float64)
    for row_1L in tokens_BL.split(1):
        streams, final_ND, chosen_N = _streams(lm, Pieces(row_1L.to(lm.model.device), row_1L.numel()))
        for rows, log_p_NV in _final(lm, final_ND):
            for layer in range(len(lens.layers)):
                h_ND = lens(streams[layer].flatten(0, 1)[chosen_N][rows], layer)
                totals[layer] += float(_kl(lm, h_ND, log_p_NV).sum())
    return [round(float(total) / tokens_BL.numel(), 4) for total in totals]


@torch.no_grad()
def _streams(lm: LanguageModel, batch: Pieces) -> tuple[list[Tensor], Tensor, Tensor]:
    """(the stream after every layer BLD, final-norm states ND of the positions that are read, their places N)."""
    layers = lm.config.num_hidden_layers
    with observe(lm.model, "layers.*.resid_post") as seen:
        h_BLD = lm.model.hidden(batch.tokens_BL)
    places_N = torch.arange(batch.tokens_BL.numel())
    if batch.read < len(places_N):
        generator = torch.Generator().manual_seed(batch.number)
        places_N = torch.randperm(len(places_N), generator=generator)[: batch.read].sort().values
    places_N = places_N.to(h_BLD.device)
    return [seen[f"layers.{n}.resid_post"] for n in range(layers)], h_BLD.flatten(0, 1)[places_N], places_N


@torch.no_grad()
def _final(lm: LanguageModel, h_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    size = max(1, CHUNK_ELEMENTS // lm.config.vocab_size)
    for start in range(0, len(h_ND), size):
        rows = slice(start, min(start + size, len(h_ND)))
        yield rows, lm.model.unembed(h_ND[rows]).float().log_softmax(-1)


def _kl(lm: LanguageModel, h_ND: Tensor, log_p_NV: Tensor) -> Tensor:
    log_q_NV = lens_logits(lm.model, h_ND).float().log_softmax(-1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)


def pieces(lm: LanguageModel, given: Settings) -> tuple[Tensor, Tensor]:
    """(pieces of text to train on, pieces to measure on), each (rows, length). Raises DataError for too little text."""
    wanted = given.steps * given.rows + given.held_out
    found: list[Sequence[int]] = []
    limit = getattr(lm.config, "max_position_embeddings", None) or given.length
    if given.length > limit:
        raise SettingsError(f"length = {given.length}; the model reads at most {limit} tokens.")
    for text in documents(given.data):
        ids = lm.tokenizer.encode(text)
        found += [ids[i : i + given.length] for i in range(0, len(ids) - given.length + 1, given.length)]
        if len(found) >= wanted:
            break
    if len(found) < given.held_out + given.rows:
        raise DataError(
            f"{given.data} has {len(found)} pieces of {given.length} tokens; {given.held_out} are set aside and "
            f"{given.rows} needed for a step. Give more text, or less length."
        )
    every = torch.tensor(found)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(given.seed))
    return every[order[given.held_out :]], every[order[: given.held_out]]

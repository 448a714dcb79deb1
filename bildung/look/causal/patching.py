"""Activation patching: an activation of one run, put into another. Does the answer come along?

    clean      When Mary and John ... John gave a drink to  -> Mary
    corrupted  When Anna and Paul ... Mark gave a drink to  -> ?

    denoising  the corrupted run, one activation from the clean one: is it enough to bring the answer back?
    noising    the clean run, one activation from the corrupted one: is it needed?

(Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022; Zhang & Nanda 2023, arXiv 2309.16042, on the choices.) The two
are not each other's mirror: of two parts that can stand in for each other, denoising finds both, noising neither.

`model` is a decoder, or any model with its question (asked.py): a masked encoder, whose prompts each hold one [MASK], a
classifier, an encoder-decoder, whose prompts are sources. Sites of its encoder are meant where none is named: "attn.z"
is encoder.layers.N.attn.z, "decoder.cross.z" decoder.layers.N.cross.z, at the positions of the answer so far.

Attribution patching (Nanda 2023; Syed et al. 2023, arXiv 2310.10348) replaces all the runs by one backward pass: the
metric's gradient at the activation times what the patch would change there. It is the patch to first order: exact in a
linear model, wrong where a softmax or a norm is saturated.
"""

# B rows, L tokens, D hidden_size, N heads, H head_dim, S keys, V vocabulary

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from bildung.core.errors import SettingsError, nearest
from bildung.look.asked import Asked, stack_prefix
from bildung.look.causal.answer_metrics import MetricName, answer_metric, check_metric, recovered
from bildung.look.causal.prompt_pairs import PairBatch, Pairs
from bildung.model.base import CausalLM
from bildung.model.taps import Tap, intervene, observe, sites

Direction = Literal["denoising", "noising"]
Across = Literal["place", "head"]
Answers = CausalLM | Asked


@dataclass(frozen=True)
class Grid:
    """What each patch did: rows are layers, columns places or heads. Values are the metric's mean over rows."""

    site: str
    columns: list[str]
    values: Tensor  # layers x columns
    clean: float
    corrupted: float
    direction: Direction
    how: Literal["patching", "attribution"]

    @property
    def recovered(self) -> Tensor:
        """0 = as the corrupted run, 1 = as the clean one, whichever direction was patched."""
        return torch.as_tensor(recovered(self.values, self.clean, self.corrupted))


def last_logits(model: Answers, tokens_BL: Tensor) -> Tensor:
    """Logits BV after the last token, or of what is asked."""
    if isinstance(model, Asked):
        return model.logits(tokens_BL)
    return model.unembed(model.hidden(tokens_BL)[:, -1:])[:, 0]


def layer_sites(model: Answers, word: str) -> list[str]:
    """The site `layers.N.<word>` of every layer that reads the tokens; "decoder.attn.z" names another stack. Raises
    SettingsError for a word that no layer has."""
    named = re.match(r"(encoder\.|decoder\.)?(.*)", word)
    assert named is not None  # it matches everything
    prefix, own = named[1] or stack_prefix(model), named[2]
    words = {name: re.sub(r"^layers\.\d+\.", "", name.removeprefix(prefix)) for name in sites(model)}
    words = {name: one for name, one in words.items() if name.startswith(f"{prefix}layers.")}
    found = [name for name, one in words.items() if one == own]
    if not found:
        hint = nearest(own, words.values())
        raise SettingsError(
            f"no layer has a site {word!r}; there are {', '.join(dict.fromkeys(words.values()))}. {hint}"
        )
    return found


def reads_prompt(model: Answers, name: str) -> bool:
    """Whether a site's positions are those of the tokens that `model` is given, not of an answer or a source beside."""
    prefix = stack_prefix(model)
    return not prefix or name.startswith(prefix)


def cells(shape: str, x: Tensor, positions_BP: Tensor | None, head: int | None = None) -> Tensor:
    """True at one head (None: all) of some positions (None: all) of an activation; broadcasts against it.

    shape: the site's, such as "B L N H" or, for attention's scores, "B N L S", where a position is the query's.
    """
    letters = shape.split()
    where = torch.ones([1] * x.ndim, dtype=torch.bool, device=x.device)
    if positions_BP is not None:
        chosen_BL = torch.zeros(x.shape[0], x.shape[letters.index("L")], dtype=torch.bool, device=x.device)
        chosen_BL.scatter_(1, positions_BP, True)
        where = where & chosen_BL.view([n if letter in "BL" else 1 for n, letter in zip(x.shape, letters, strict=True)])
    if head is not None:
        dim = next(number for number, letter in enumerate(letters) if letter in "NK")
        is_head = torch.arange(x.shape[dim], device=x.device) == head
        where = where & is_head.view([-1 if number == dim else 1 for number in range(x.ndim)])
    return where


def putting(there: Tensor, where: Tensor) -> Tap:
    """An intervention: `there` instead of what passes, at the cells `where`."""
    return lambda x: torch.where(where, there, x)


def patching_grid(
    model: Answers,
    pairs: Pairs,
    *,
    site: str = "resid_pre",
    across: Across = "place",
    at: Sequence[str] = (),
    metric: MetricName = "logit_difference",
    direction: Direction = "denoising",
    attribution: bool = False,
    batch_size: int = 16,
) -> Grid:
    """Patch `site` of every layer, at each place (all heads together) or each head, and measure the answer.

    at: with across="head", the places whose positions are patched (none: all positions).
    attribution: by gradients instead of runs. Raises SettingsError, DataError.
    """
    check_metric(metric, pairs)
    names = layer_sites(model, site)
    shape = sites(model)[names[0]]
    places, columns = _columns(model, pairs, names[0], shape, across, at)
    batches = pairs.batches(batch_size, model.device)
    total, clean, corrupted, count = torch.zeros(len(names), len(columns)), 0.0, 0.0, 0
    for batch in batches:
        run = _Run(model, batch, names, metric, direction)
        clean, corrupted = clean + run.clean_B.sum().item(), corrupted + run.corrupted_B.sum().item()
        count += len(batch.rows)
        changes = run.attributed() if attribution else None
        for column in range(len(columns)):
            head = column if across == "head" else None
            chosen = places if across == "head" else [columns[column]]
            positions_BP = torch.stack([batch.at(place) for place in chosen], 1) if chosen else None
            for layer, name in enumerate(names):
                where = cells(shape, run.source[name], positions_BP, head)
                if changes is not None:
                    total[layer, column] += (run.into_B.sum() + (changes[name] * where).sum()).item()
                else:
                    total[layer, column] += run.patched(name, where).sum().item()
    how: Literal["patching", "attribution"] = "attribution" if attribution else "patching"
    return Grid(site, columns, total / count, clean / count, corrupted / count, direction, how)


def _columns(
    model: Answers, pairs: Pairs, name: str, shape: str, across: Across, at: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The places that `at` names, and the names of the columns."""
    places: list[str] = []
    if across == "place" or at:
        places = (
            pairs.places() if reads_prompt(model, name) else [str(n) for n in range(len(cast(Asked, model).answer))]
        )
    if unknown := [place for place in at if place not in places]:
        raise SettingsError(f"no place {unknown[0]!r} at {name}; there are {', '.join(places)}.")
    if across == "place":
        return [], list(at) or places
    letter = next((letter for letter in shape.split() if letter in "NK"), None)
    if letter is None:
        raise SettingsError(f"{name} ({shape}) has no heads; attn.z, attn.q, attn.k, attn.v and attn.probs have.")
    config = model.config.encoder if name.startswith("encoder.") and hasattr(model.config, "encoder") else model.config
    heads = config.num_attention_heads if letter == "N" else config.num_key_value_heads
    return list(at), [str(head) for head in range(heads)]


class _Run:
    """The clean and the corrupted run of one batch; `source` are the activations to patch in."""

    def __init__(
        self, model: Answers, batch: PairBatch, names: Sequence[str], metric: MetricName, direction: Direction
    ):
        self.model, self.batch, self.metric, self.names = model, batch, metric, names
        denoising = direction == "denoising"
        self.into_BL, from_BL = (
            (batch.corrupted_BL, batch.clean_BL) if denoising else (batch.clean_BL, batch.corrupted_BL)
        )
        with torch.no_grad():
            self.clean_BV = last_logits(model, batch.clean_BL)
            self.clean_B = self.measure(self.clean_BV)
            self.corrupted_B = self.measure(last_logits(model, batch.corrupted_BL))
            with observe(model, names) as self.source:
                last_logits(model, from_BL)
        self.into_B = self.corrupted_B if denoising else self.clean_B

    def measure(self, logits_BV: Tensor) -> Tensor:
        return answer_metric(self.metric, logits_BV, self.batch.rows, self.clean_BV)

    @torch.no_grad()
    def patched(self, name: str, where: Tensor) -> Tensor:
        """The metric B with one patch."""
        with intervene(self.model, {name: putting(self.source[name], where)}):
            return self.measure(last_logits(self.model, self.into_BL))

    def attributed(self) -> dict[str, Tensor]:
        """What patching each number of each site would change in the sum of the metric, to first order."""
        with torch.enable_grad(), frozen(self.model), intervene(self.model, {self.names[0]: _leaf}):
            with observe(self.model, self.names) as seen:
                total = self.measure(last_logits(self.model, self.into_BL)).sum()
            gradients = torch.autograd.grad(total, [seen[name] for name in self.names], allow_unused=True)
        changes = {}
        for name, gradient in zip(self.names, gradients, strict=True):
            there, here = self.source[name], seen[name].detach()
            # Masked scores are -inf in both runs, and nothing changes there.
            changed = torch.where(there == here, 0.0, there - here)
            changes[name] = torch.zeros_like(there) if gradient is None else gradient * changed
        return changes


def _leaf(x: Tensor) -> Tensor:
    """With the weights frozen, gradients begin here."""
    return x.detach().requires_grad_()


@contextmanager
def frozen(model: Answers) -> Iterator[None]:
    """Inside the block the weights ask for no gradient: only activations are asked, and nothing is kept for others."""
    trained = [one for one in model.parameters() if one.requires_grad]
    for one in trained:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in trained:
            one.requires_grad_(True)


def labelled(grid: Grid) -> Iterator[tuple[str, float]]:
    """Every cell as ("layer 3, end", recovered), the strongest first."""
    cells_by_name = {
        f"layer {layer}, {column}": value
        for layer, row in enumerate(grid.recovered.tolist())
        for column, value in zip(grid.columns, row, strict=True)
    }
    yield from sorted(cells_by_name.items(), key=lambda item: -abs(item[1]))

"""Patchscopes: put a vector of one run into another run, and let that one say what is in the vector.

    source   S = "... to the United States"     model M,  position i,  after layer l      h
    target   T = "The official currency of x"   model M*, position i*, after layer l*     h* <- f(h), then go on

(Ghandeharioun et al. 2024, arXiv 2401.06102.) M and M* may be any two models, of any widths if f maps between them:
only a vector crosses, so their tokenizers need not agree. Much is a special case. With M* = M, f the identity, l* the
last layer and T read where it was patched, it is the logit lens, bit for bit, whatever T says: above the last layer
there is only the final norm, which works on each position alone. With f a tuned lens' map it is the tuned lens.

M may also be an encoder, which has a stream and says nothing. Of an encoder-decoder one half is given (asked.py's
`stack_in`): patched in its encoder, it answers the source with the vector in it; in its decoder, it goes on from the
answer with the vector in it. A masked encoder as M* says what stands at its [MASK], and writes no more.

The patch is made where the prompt is read, and nowhere else: positions are absolute, also with a KV cache, so what is
generated is not patched again. (The authors' code has to guess this from a pass having one token.)
"""

# R runs, N layers, P positions, L length, D the source's hidden_size, E the target's, V vocabulary, K kept candidates

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import BadIntervention, DataError, NoSuchSite, SettingsError
from bildung.look.asked import Asked, SourceReader, asked, stack_prefix
from bildung.look.lenses.lens import CANDIDATES
from bildung.look.patchscopes.patch_targets import Target
from bildung.model.base import CausalLM
from bildung.model.store import LanguageModel
from bildung.model.taps import Tap, intervene, observe
from bildung.run.decode import only_known
from bildung.run.loop import check, decode_steps, last_logits, prefix_of, working
from bildung.run.sources import reading
from bildung.run.write import answer_text

Map = Callable[[Tensor, int, int], Tensor]  # f: (h RD, layer, target layer) -> h RE
ROWS = 128  # runs in one batch


def identity(h_RD: Tensor, layer: int, target_layer: int) -> Tensor:
    """The f of most of the paper: the vector as it is."""
    return h_RD


@dataclass(frozen=True)
class Cell:
    """One run: the vector at `position` after `layer` of the source goes to after `target_layer` of the target."""

    position: int
    layer: int
    target_layer: int


@dataclass
class Patchscoped:
    """What every run said. expected: the token that the source model itself says next at the cell's position (the
    next-token task of the paper); None where the models have different vocabularies."""

    cells: list[Cell]
    top_ids_RK: Tensor  # after the target prompt's last token, most probable first
    top_probs_RK: Tensor
    texts: list[str]  # what was generated; empty strings where nothing was asked for
    expected_R: Tensor | None
    expected_probs_R: Tensor | None  # the probability that the run gives it


Reader = CausalLM | Asked  # what reads the patched prompt


def reader_of(lm: LanguageModel) -> Reader:
    """The model that reads a target prompt. Raises DataError for one that answers nothing."""
    if isinstance(lm.model, SourceReader):
        return Asked(lm.model.whole)
    return lm.model if isinstance(lm.model, CausalLM) else asked(lm)


@torch.no_grad()
def patchscope(
    source: LanguageModel,
    tokens: Sequence[int],
    target: Target,
    cells: Sequence[Cell],
    *,
    into: LanguageModel | None = None,
    f: Map = identity,
    new_tokens: int = 0,
    rows: int = ROWS,
) -> Patchscoped:
    """Run every cell. into: the target's model, if it is another one.

    Raises DataError for a position past a prompt, widths that differ without an f, or a prompt that is too long;
    NoSuchSite for a layer that does not exist; BadIntervention for an f that returns another width.
    """
    into = into or source
    check_cells(source, into, tokens, target, cells, f)
    h_RE, expected_R = mapped(source, into, tokens, cells, f)
    layers = [cell.target_layer for cell in cells]
    probs_RV = patched_logits(reader_of(into), target, h_RE, layers, rows).float().softmax(-1)
    top = probs_RV.topk(min(CANDIDATES, probs_RV.shape[-1]))
    texts = patched_texts(into, target, h_RE, layers, new_tokens, rows) if new_tokens else [""] * len(cells)
    same = source.tokenizer.backend.get_vocab() == into.tokenizer.backend.get_vocab()
    if same and expected_R is not None and source.config.vocab_size == into.config.vocab_size:
        found_R = probs_RV.gather(-1, expected_R[:, None].to(probs_RV.device))[:, 0].cpu()
        return Patchscoped(list(cells), top.indices.cpu(), top.values.cpu(), texts, expected_R.cpu(), found_R)
    return Patchscoped(list(cells), top.indices.cpu(), top.values.cpu(), texts, None, None)


def check_cells(
    source: LanguageModel,
    into: LanguageModel,
    tokens: Sequence[int],
    target: Target,
    cells: Sequence[Cell],
    f: Map = identity,
) -> None:
    """Raises DataError, NoSuchSite or SettingsError for what cannot be run."""
    for lm in (source, into):
        check_has_stream(lm)
    reader_of(into)
    for lm, name, ids in ((source, "source", tokens), (into, "target", target.tokens)):
        context = getattr(lm.config, "max_position_embeddings", None) or len(ids)
        if not 0 < len(ids) <= context:
            raise DataError(f"the {name} prompt has {len(ids)} tokens; {lm.config.model_type} reads 1 to {context}.")
    if not cells:
        raise SettingsError("no run was asked for: give at least one layer and one target layer.")
    for cell in cells:
        check_layer(source, cell.layer, "source")
        check_layer(into, cell.target_layer, "target")
        if not 0 <= cell.position < len(tokens):
            raise DataError(f"position {cell.position} lies past the source prompt, which has {len(tokens)} tokens.")
    if not 0 <= target.position < len(target.tokens):
        raise DataError(
            f"position {target.position} lies past the target prompt, which has {len(target.tokens)} tokens."
        )
    widths = source.config.hidden_size, into.config.hidden_size
    if f is identity and widths[0] != widths[1]:
        raise DataError(
            f"the source's vectors have {widths[0]} numbers and the target's {widths[1]}; between models of different "
            "widths an f is needed: learn an affine one with `bildung look stream_map`, or give a function."
        )


def check_has_stream(lm: LanguageModel) -> None:
    """Raises DataError for a model without a stream of vectors of a text."""
    if f"{getattr(lm.model, 'stack', '')}layers.0.resid_post" not in lm.model.sites or lm.config.kind == "vision":
        two = " Choose one of its two stacks (asked.py: stack_in)." if hasattr(lm.model, "given") else ""
        raise DataError(
            f"a {lm.config.model_type} of kind {lm.config.kind!r} has no one stream of vectors of a text.{two}"
        )


def check_layer(lm: LanguageModel, layer: int, which: str) -> None:
    """Raises NoSuchSite for a layer that the model does not have."""
    if not 0 <= layer < lm.config.num_hidden_layers:
        raise NoSuchSite(
            f"layer {layer} of the {which} does not exist; its layers are 0 to {lm.config.num_hidden_layers - 1}."
        )


@torch.no_grad()
def streams(lm: LanguageModel, tokens: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """(the residual stream after every layer NLD, the token said next at each position L), of one text; None for a
    model that does not go on."""
    sites = [f"{stack_prefix(lm.model)}layers.{n}.resid_post" for n in range(lm.config.num_hidden_layers)]
    tokens_1L = torch.tensor([list(tokens)], device=lm.model.device)
    with observe(lm.model, sites) as seen:
        next_L = lm.model(tokens_1L)[0].argmax(-1) if isinstance(lm.model, CausalLM) else lm.model.hidden(tokens_1L)
    return torch.stack([seen[site][0] for site in sites]), next_L if isinstance(lm.model, CausalLM) else None


def mapped(
    source: LanguageModel, into: LanguageModel, tokens: Sequence[int], cells: Sequence[Cell], f: Map
) -> tuple[Tensor, Tensor | None]:
    """(f of each cell's vector RE, on the target's device and in its type; what the source says next there R)."""
    source.model.eval()
    h_NLD, next_L = streams(source, tokens)
    h_RE: list[Tensor | None] = [None] * len(cells)
    pairs = {(cell.layer, cell.target_layer) for cell in cells}
    for layer, target_layer in sorted(pairs):
        mine = [r for r, cell in enumerate(cells) if (cell.layer, cell.target_layer) == (layer, target_layer)]
        given = f(h_NLD[layer, [cells[r].position for r in mine]], layer, target_layer)
        if given.shape != (len(mine), into.config.hidden_size):
            raise BadIntervention(
                f"f returned {tuple(given.shape)} for {len(mine)} vectors; the target takes "
                f"{(len(mine), into.config.hidden_size)}."
            )
        for r, vector in zip(mine, given, strict=True):
            h_RE[r] = vector.to(into.model.device, into.model.dtype)
    expected_R = None if next_L is None else next_L[[cell.position for cell in cells]]
    return torch.stack([h for h in h_RE if h is not None]), expected_R


@torch.no_grad()
def patched_logits(model: Reader, target: Target, h_RE: Tensor, layers: Sequence[int], rows: int = ROWS) -> Tensor:
    """Logits RV after the target prompt's last token (or what else is asked); run r has h_RE[r] in it, after layer
    layers[r]."""
    found = []
    for start in range(0, len(h_RE), rows):
        part = slice(start, start + rows)
        count = len(h_RE[part])
        edits = dict(_edits(stack_prefix(model), target, h_RE[part], layers[part]))
        if isinstance(model, Asked):
            with intervene(model, edits):
                found.append(model.logits(torch.tensor([target.tokens] * count, device=model.device)))
            continue
        cache = _read_before(model, target, count, len(target.tokens))
        with intervene(model, edits), working(model, pack=False):
            past = 0 if cache is None else target.position
            tokens_BL = torch.tensor([target.tokens[past:]] * count, device=model.device)
            found.append(last_logits(model, tokens_BL, None, None, cache, prefix_of(model, tokens_BL, None)))
    return torch.cat(found)


def patched_texts(
    lm: LanguageModel, target: Target, h_RE: Tensor, layers: Sequence[int], new_tokens: int, rows: int = ROWS
) -> list[str]:
    """What the model writes after the target prompt, greedily; patched as in `patched_logits`, in the prompt alone.
    A masked encoder writes nothing.

    Raises SettingsError where prompt and answer exceed the model's context."""
    model, stop_ids, texts = reader_of(lm), lm.tokenizer.stop_ids, list[str]()
    if isinstance(model, Asked) and not model.answers_source:
        return [""] * len(h_RE)
    if not isinstance(model, Asked):
        check(model, [target.tokens], new_tokens)
    known = [only_known(lm.tokenizer.vocab_size)] if lm.config.vocab_size > lm.tokenizer.vocab_size else []
    for start in range(0, len(h_RE), rows):
        part = slice(start, start + rows)
        count = len(h_RE[part])
        answers: list[list[int]] = [[] for _ in range(count)]
        with intervene(model, dict(_edits(stack_prefix(model), target, h_RE[part], layers[part]))):
            if isinstance(model, Asked):  # the source is read once, with the vectors in it
                writer, prompts, own = reading(model.whole, [target.tokens] * count)
                begun, cache = prompts[0], None
            else:
                writer, begun, own = model, target.tokens, []
                with model.taps.attached_only():
                    cache = _read_before(model, target, count, len(target.tokens) + new_tokens)
            for step in decode_steps(
                writer,
                [begun] * count,
                new_tokens=new_tokens,
                rules=[*own, *known],
                stop_ids=stop_ids,
                kv_cache=cache,
            ):
                for answer, token, running in zip(answers, step.tokens, step.running, strict=True):
                    if running:
                        answer.append(token)
        texts += [answer_text(lm.tokenizer, begun, answer) for answer in answers]
    return texts


@torch.no_grad()
def _read_before(model: CausalLM, target: Target, count: int, room: int) -> Any:
    """A KV cache of `count` equal rows that holds the target up to its patched position, which all runs share: read
    once. None where nothing lies before, and for a prefix-LM, whose early tokens see the later ones."""
    if model.prefix_lm or target.position == 0:
        return None
    cache = model.kv_cache(1, room)
    with working(model, pack=False):
        last_logits(model, torch.tensor([target.tokens[: target.position]], device=model.device), None, None, cache)
    cache.select(torch.zeros(count, dtype=torch.int64, device=model.device))
    return cache


def _edits(prefix: str, target: Target, h_RE: Tensor, layers: Sequence[int]) -> Iterator[tuple[str, Tap]]:
    """One intervention per target layer, on the rows that are patched there."""
    for layer in sorted(set(layers)):
        rows = [r for r, one in enumerate(layers) if one == layer]

        def put(x_R1E: Tensor, rows: list[int] = rows) -> Tensor:
            return h_RE[rows][:, None].to(x_R1E)

        yield f"{prefix}layers.{layer}.resid_post[{'|'.join(map(str, rows))}, {target.position}]", put

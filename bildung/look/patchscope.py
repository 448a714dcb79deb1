"""Ask a model what is in a vector: a Patchscope of every layer, as a grid of what the patched runs say.

    bildung look patchscope MODEL OUT --prompt "Diana, Princess of Wales" --target description
    bildung look patchscope MODEL OUT --prompt "..." --target "The capital of {} is" --at "United States"
    bildung look patchscope MODEL OUT --prompt "..." --across position          every position, each layer to itself
    bildung look patchscope SMALL OUT --prompt "..." --into LARGE --map MAPS     a larger model explains a smaller one
    bildung look patchscope T5 OUT --prompt "..." --stack encoder --target-stack encoder --target "translate: {}"

OUT gets patchscope.html (one file, works offline), patchscope.png and patchscope.json. What is computed is in
patchscopes.py, the published target prompts are in patch_targets.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.asked import StackName
from bildung.look.lenses.lens import ANSWER
from bildung.look.pages.page import command_of
from bildung.look.pages.patchscope_page import as_json, draw, page, summary
from bildung.look.patchscopes.patch_targets import place_of, target_prompt
from bildung.look.patchscopes.patchscopes import Cell, check_layer, identity
from bildung.look.patchscopes.patchscopes import patchscope as run_cells
from bildung.look.patchscopes.stream_maps import StreamMaps, read_maps
from bildung.look.prompt import encode_prompt, half, text_in
from bildung.look.stream_map import same_depth
from bildung.model.encoder_decoder import EncoderDecoder
from bildung.model.store import LanguageModel, load


@settings_class
class Settings:
    """A Patchscope."""

    prompt: str  # the source prompt
    chat: bool = False  # the prompt is a user's turn, put through the model's chat template
    at: str | None = None  # the vector is of the last token of this part of the prompt
    position: int = -1  # or of this one; negative: from the end
    stack: StackName = "encoder"  # of an encoder-decoder: its encoder reads the prompt, its decoder its own answer
    target_stack: StackName = "encoder"  # the same of the model that reads the target; its decoder has no source
    target: str = "token_identity"  # token_identity, description, or a text with {} where the vector goes
    target_position: int | None = None  # in a text without {}: which token is patched; default: the last
    across: Literal["target_layer", "position"] = "target_layer"  # the grid's columns
    layers: tuple[int, ...] = ()  # of the source, the grid's rows; default: all
    target_layers: tuple[int, ...] = ()  # default: all; across positions: each layer's own (or that of like depth)
    step: int = 1  # of all layers only every so many-th, and the last
    into: Path | None = None  # the model that reads the target; default: the source itself
    map: Path | None = None  # affine maps between the two, made by `look stream_map`; default: the vector as it is
    new_tokens: int = 8  # that each run writes; 0: the next token alone
    dtype: str | None = None  # type to load the models in; default: as stored
    max_tokens: int = 512  # refuse longer prompts


def patchscope_cells(
    lm: LanguageModel, into: LanguageModel, positions: Sequence[int], given: Settings, maps: StreamMaps | None
) -> tuple[list[Cell], list[int]]:
    """(the runs row by row, the columns: target layers, or positions)."""
    if given.step < 1:
        raise SettingsError(f"step = {given.step}; it is at least 1.")
    layers = list(given.layers) or (sorted({a for a, _ in maps.maps}) if maps else every(lm, given.step))
    theirs = list(given.target_layers) or (sorted({b for _, b in maps.maps}) if maps else every(into, given.step))
    for layer in layers:
        check_layer(lm, layer, "source")
    if given.across == "target_layer":
        pairs = [(layer, one) for layer in layers for one in theirs]
        return [Cell(positions[0], *pair) for pair in pairs if maps is None or pair in maps.maps], theirs
    if given.target_layers and len(theirs) != len(layers):
        raise SettingsError(f"across positions, give one target layer for each of the {len(layers)} layers.")
    goes = (
        dict(zip(layers, theirs, strict=True)) if given.target_layers else {n: same_depth(lm, into, n) for n in layers}
    )
    return [Cell(place, layer, goes[layer]) for layer in layers for place in positions], list(positions)


def every(lm: LanguageModel, step: int) -> list[int]:
    """Every step-th layer from the first, and the last."""
    last = lm.config.num_hidden_layers - 1
    return sorted({*range(0, last + 1, step), last})


def patchscope_of(lm: LanguageModel, given: Settings, into: LanguageModel | None = None) -> dict[str, Any]:
    """All that the page shows. Raises DataError, NoSuchSite, SettingsError, ModelFileError for what cannot be run."""
    target_lm = half(into or lm, given.target_stack)
    if isinstance(lm.model, EncoderDecoder) and given.stack == "decoder":
        lm, tokens = text_in(lm, given.prompt, chat=given.chat, limit=given.max_tokens, new_tokens=ANSWER)
    else:
        lm = half(lm, given.stack)
        tokens = encode_prompt(lm, given.prompt, given.chat, given.max_tokens)
    maps = read_maps(given.map, lm, target_lm) if given.map else None
    if given.at is not None and given.chat:
        raise SettingsError("`at` is looked up in the plain prompt; with a chat template give the position.")
    place = place_of(lm, given.prompt, tokens, given.position if given.at is None else given.at)
    positions = list(range(len(tokens))) if given.across == "position" else [place]
    target = target_prompt(target_lm, given.target, given.target_position)
    cells, columns = patchscope_cells(lm, target_lm, positions, given, maps)
    f = maps or identity
    found = run_cells(lm, tokens, target, cells, into=target_lm, f=f, new_tokens=given.new_tokens)
    numbers = as_json(lm, target_lm, tokens, target, found, columns)
    what = "position of the source prompt" if given.across == "position" else "target layer"
    return numbers | {"across": given.across, "columns_are": what, "prompt": given.prompt, "place": place}


def patchscope(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page, the picture and the numbers. Raises as `patchscope_of`."""

    def work(job: Job) -> None:
        lm = load(source, settings.dtype)
        into = load(settings.into, settings.dtype) if settings.into else None
        numbers = patchscope_of(lm, settings, into) | {"model": Path(source).name}
        numbers["into"] = settings.into.name if settings.into else None
        numbers["command"] = command_of(job)
        text = json.dumps(numbers, ensure_ascii=False, allow_nan=False)
        (job.out / "patchscope.json").write_text(text + "\n", encoding="utf-8")
        (job.out / "patchscope.html").write_text(page(numbers), encoding="utf-8")
        draw(numbers, job.out / "patchscope.png")
        job.measured = summary(numbers)
        job.tokens_seen = len(numbers["tokens"]) + len(numbers["target_tokens"]) * len(numbers["cells"])

    companions = {k: v for k, v in {"into": settings.into, "map": settings.map}.items() if v is not None}
    return perform("look patchscope", source, out, settings, work, companions=companions, force=force)

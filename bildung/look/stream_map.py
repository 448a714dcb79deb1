"""Learn affine maps from the layers of one model to those of another, for Patchscopes between them.

    bildung look stream_map SMALL OUT --target LARGE --data nursery:brown                      layers of the same depth
    bildung look stream_map MODEL OUT --data nursery:brown --layers 5 10 --target-layers 2 2   5 -> 2 and 10 -> 2
    bildung look patchscope SMALL PAGE --into LARGE --map OUT --prompt "..." --target description

OUT gets stream_map.safetensors and .json with the hashes of both models' weights. The computation is in
stream_maps.py.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.data.text import documents
from bildung.look.asked import stack_in
from bildung.look.patchscopes.patchscopes import check_has_stream, check_layer
from bildung.look.patchscopes.stream_maps import Pair, learn_maps, pieces, write_maps
from bildung.model.store import LanguageModel, load


@settings_class
class Settings:
    """Affine maps between two models' streams."""

    data: str = "nursery:brown"  # prose that both read
    target: Path | None = None  # the model that vectors go to; default: the source itself
    layers: tuple[int, ...] = ()  # of the source; default: all
    target_layers: tuple[int, ...] = ()  # one for each layer; default: those at the same depth
    every: bool = False  # every layer to every target layer, not one to one
    pieces: int = 200  # of text are read at most
    length: int = 128  # tokens of each
    dtype: str | None = None  # type to load both models in; default: as stored (it must be the same when maps are used)


def stream_map(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Learn the maps and write them. Raises DataError for too little text, NoSuchSite for a layer that is not there."""
    if settings.pieces < 16 or settings.length < 2:
        raise SettingsError("pieces is at least 16 (every 8th is held out) and length at least 2.")

    def work(job: Job) -> None:
        # Of an encoder-decoder the encoder: a text is its source.
        lm = stack_in(load(source, settings.dtype), "encoder", ())
        into = stack_in(load(settings.target, settings.dtype), "encoder", ()) if settings.target else lm
        texts = pieces(lm, documents(settings.data), settings.length, settings.pieces)
        maps, explained, count = learn_maps(lm, into, texts, chosen_pairs(lm, into, settings), longest=settings.length)
        write_maps(maps, job.out)
        job.tokens_seen = count
        job.measured = {"positions": count, "source weights": maps.source, "target weights": maps.target}
        for (layer, target_layer), share in explained.items():
            job.measured[f"R² held out, {layer} -> {target_layer}"] = round(share, 4)
            print(f"layer {layer:3d} -> {target_layer:3d}   R² on held-out text {share:.3f}")

    companions = {"target": settings.target} if settings.target else {}
    data = fingerprint(settings.data)
    return perform("look stream_map", source, out, settings, work, data=data, companions=companions, force=force)


def chosen_pairs(lm: LanguageModel, into: LanguageModel, given: Settings) -> list[Pair]:
    """The pairs of layers that the settings ask for."""
    for one in (lm, into):
        check_has_stream(one)
    layers = list(given.layers or range(lm.config.num_hidden_layers))
    if given.every:
        theirs = list(given.target_layers or range(into.config.num_hidden_layers))
        pairs = list(product(layers, theirs))
    else:
        theirs = list(given.target_layers) or [same_depth(lm, into, layer) for layer in layers]
        if len(theirs) != len(layers):
            raise SettingsError(
                f"{len(layers)} layers and {len(theirs)} target layers were given; give one for each, or --every."
            )
        pairs = list(zip(layers, theirs, strict=True))
    for layer, target_layer in pairs:
        check_layer(lm, layer, "source")
        check_layer(into, target_layer, "target")
    return pairs


def same_depth(lm: LanguageModel, into: LanguageModel, layer: int) -> int:
    """The target's layer at the same share of its depth; the same number in models of as many layers."""
    return round(layer * (into.config.num_hidden_layers - 1) / max(1, lm.config.num_hidden_layers - 1))

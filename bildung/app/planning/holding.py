"""The plan of operations that hold a model and hardly run it.

    adopt                             adopting.py
    merge, quantize, evaluate         measuring.py
    show, sites, relink, look table   the model, as it lies in its files; relink an adapter beside it
    tune combine, tune cut            the model, the adapters on it, and its files once more, to be compared
    tune stretch                      the model, and the new table
    export                            what the run trains and its optimizer's state, but no step
    embed                             the model, and one pass over 32 texts
    self-instruct                     the model that writes, and a batch of prompts with their answers

A file that is mapped a second time counts a second time in a process's memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bildung.app.planning.adopting import adopt_passes
from bildung.app.planning.looks_text import writing
from bildung.app.planning.measuring import evaluate_passes, merge_passes, quantize_passes
from bildung.app.planning.passes import Look, Pass, stored_type
from bildung.app.planning.training import model_of
from bildung.app.planning.using import base_of, file_bytes
from bildung.core.errors import AdapterError, DataError, OutputError
from bildung.core.settings import resolve
from bildung.core.staging import INPUTS, staging_of
from bildung.core.verbs import find, verbs
from bildung.instruct.prompts import ask_for_instances, ask_for_instructions
from bildung.instruct.self_instruct import OF_PEOPLE, OF_THE_MODEL, SHOWN_INSTANCES, first_shown, read_seeds
from bildung.model import adapter_file
from bildung.model.store import LanguageModel
from bildung.run.embed import recipe
from bildung.run.generate import encode_prompt
from bildung.run.loop import check
from bildung.train.plan import state_bytes
from bildung.train.training import check_continues_text
from bildung.tune.merge import check_is_adapter
from bildung.tune.stretch import check as check_stretch

AT_ONCE = 32  # texts that are embedded together
RANK = 8  # of adapters that nobody gave


def only_loaded(look: Look) -> list[Pass]:
    """`show`, `sites`: the model is there and does nothing."""
    look.read(look.source)
    return []


def table(look: Look) -> list[Pass]:
    """`look table`: the models one after the other; the one before is let go when the next is there."""
    alone = []
    for path in (look.source, *look.given.models):
        before = look.parts.get("weights", 0)
        look.read(path)
        alone.append(look.parts["weights"] - before)
    look.parts["weights"] = max(map(sum, zip([0, *alone], alone, strict=False)))
    return []


def relink(look: Look) -> list[Pass]:
    """`relink ADAPTER BASE`: the base is loaded, and the adapter put on it."""
    base = look.given.base if "base" not in look.assumed else base_of(look.source)
    look.read(base)
    look.parts["adapter"] = adapter_bytes(look.source)
    return []


def combine(look: Look) -> list[Pass]:
    """`tune combine`."""
    lm = look.read(look.source)
    if "adapters" in look.assumed:
        linears = lm.model.linears()
        each = 4 * RANK * sum(o.in_features + o.out_features for name, o in linears.items() if name != "lm_head")
        adapters = 2 * each
        look.say(f"adapters: two of rank {RANK} on every matrix")
    else:
        adapters = sum(map(adapter_bytes, look.given.adapters))
    look.parts["adapters"] = adapters
    look.parts["the two of them side by side, to be written"] = adapters
    look.parts["the model's files once more, compared"] = file_bytes(base_of(look.source))
    return []


def cut(look: Look) -> list[Pass]:
    """`tune cut`."""
    check_is_adapter(look.source, "cut")
    look.read(look.source)
    look.parts["the model's files once more, compared"] = file_bytes(base_of(look.source))
    return []


def stretch(look: Look) -> list[Pass]:
    """`tune stretch`."""
    lm = look.read(look.source)
    positions = 2 * lm.config.max_position_embeddings if "positions" in look.assumed else look.given.positions
    if "positions" in look.assumed:
        look.say(f"positions: {positions}, twice as many")
    check_stretch(lm, positions)
    look.parts["the new table"] = 2 * positions * lm.config.hidden_size * lm.model.weight_dtype.itemsize
    return []


def export(look: Look) -> list[Pass]:
    """`export RUN OUT`: the run's own operation, told that training is over. Raises OutputError for what is no run."""
    place = next((one for one in (look.source, staging_of(look.source)) if (one / INPUTS).is_file()), None)
    if place is None:
        raise OutputError(f"{look.source} is no training run, nor is there a .partial; give what a run was to make.")
    inputs = json.loads((place / INPUTS).read_text(encoding="utf-8"))
    operation, source = inputs["operation"], inputs["source"]
    given = resolve(find(operation, verbs()).load().Settings, inputs["settings"])
    target = place.with_name(place.name.removesuffix(".partial"))
    begun_from = Path(target / source["path"]).resolve() if source else target
    model = model_of(operation, begun_from, given)
    if (begun_from / "config.json").exists() and stored_type(begun_from) != model.weight_dtype:
        look.later["the source's file, while its numbers change their type"] = file_bytes(begun_from)
    look.runs = operation, begun_from
    held = {id(one): one for one in model.parameters()}.values()
    look.remarks.append(f"a run of {operation}")
    look.parts["weights"] = sum(one.nbytes for one in held)
    look.parts["optimizer"] = state_bytes(model, given.optimizer, given.weights, given.page_budget * 1e6)
    look.parts["the checkpoint, as it is read"] = sum(one.nbytes for one in held if one.requires_grad)
    return []


def embed(look: Look) -> list[Pass]:
    """`embed`."""
    lm = look.read(look.source)
    if lm.config.kind != "encoder":
        raise DataError(f"a {lm.config.model_type} is of kind {lm.config.kind!r}; sentence embeddings need an encoder.")
    longest = min(recipe(base_of(look.source)).max_length or 2**30, lm.config.max_position_embeddings)
    if "texts" in look.assumed:
        lengths = [min(look.length, longest)] * AT_ONCE
        look.say(f"texts: {AT_ONCE} of {lengths[0]} tokens")
    else:
        lengths = sorted(min(longest, len(lm.tokenizer.encode(text)) + 2) for text in look.given.texts)
    rows, length = min(AT_ONCE, len(lengths)), lengths[-1]

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        model = lms[0].model
        tokens_BL = torch.zeros(rows, length, dtype=torch.long, device=model.device)
        keep_BL = (torch.arange(length) < torch.tensor(lengths[-rows:])[:, None]).to(model.device)
        h_BLD = model.hidden(tokens_BL, keep_BL=keep_BL).float()
        return h_BLD, h_BLD * keep_BL[..., None]

    return [Pass(f"{rows} texts of {length} tokens", run, -(-len(lengths) // AT_ONCE))]


def self_instruct(look: Look) -> list[Pass]:
    """`self-instruct`: the longer of its prompts, a batch of them."""
    given = look.given
    if given.endpoint:
        look.remarks.append("a server writes: no model is held here")
        return []
    lm = look.read(look.source)
    check_continues_text(lm)
    seeds, _ = read_seeds(given.seeds)

    def tokens(prompt: str) -> int:
        return len(encode_prompt(lm, prompt, given.chat))

    begun = [tokens(ask_for_instructions(one)) for one in first_shown(seeds, given)]
    check(lm.model, [[0] * length for length in begun], given.new_tokens)
    longest = sorted(seeds, key=lambda one: -len(str(one)))
    series = ask_for_instructions([one.instruction for one in longest[: OF_PEOPLE + OF_THE_MODEL]])
    prompt = max(tokens(series), tokens(ask_for_instances(longest[:SHOWN_INSTANCES], longest[0].instruction, False)))
    if prompt > (room := lm.config.max_position_embeddings - given.new_tokens):
        look.remarks.append(
            f"prompts may have up to {prompt} tokens, and {room} fit beside an answer of {given.new_tokens}: at the "
            f"first that does not it ends, and what was answered is kept"
        )
        prompt = room
    look.remarks.append("how many prompts it takes until enough is kept depends on what the model writes")
    return [writing(look, 0, given.batch_size, prompt, given.new_tokens)]


def adapter_bytes(directory: Path) -> int:
    """Bytes of an adapter's file. Raises AdapterError."""
    directory = directory.expanduser()
    if not (directory / adapter_file.CONFIG).exists():
        raise AdapterError(f"{directory} is no adapter directory (no {adapter_file.CONFIG}).")
    return sum(one.stat().st_size for one in directory.glob("*.safetensors"))


HOLDING: Mapping[str, Callable[[Look], list[Pass]]] = {
    "adopt": adopt_passes,
    "merge": merge_passes,
    "quantize": quantize_passes,
    "evaluate": evaluate_passes,
    "show": only_loaded,
    "sites": only_loaded,
    "relink": relink,
    "look table": table,
    "tune combine": combine,
    "tune cut": cut,
    "tune stretch": stretch,
    "export": export,
    "embed": embed,
    "self-instruct": self_instruct,
}

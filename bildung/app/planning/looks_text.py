"""The passes of looks that read one prompt, image or source: which sites are kept, and what is made of them.

    attention     every head's pattern: layers x heads x L x L, twice while they are put together
    logit_lens    the stream after every layer, and a few tables of logits L x V
    saliency      a backward pass; for integrated gradients 16 points of the path at a time
    attribution   what every part wrote, and the unembedding in float64
    trace         every state of the clean run, a copy of the embedding, and as many rows as there is noise
    patchscope    128 runs at a time, and the logits of all

Attention that is to give its patterns takes another way than the kernel that never makes them, on paper, too.
"""

# L tokens, V vocabulary

from __future__ import annotations

import math
from typing import Any

import torch

from bildung.app.planning.passes import PICTURE, Look, Pass, told
from bildung.app.planning.using import packed_bytes
from bildung.core.errors import DataError, SettingsError
from bildung.data.image_processor import read_processor
from bildung.look.asked import asked, stack_in, stack_prefix
from bildung.look.attention import PICTURE as PICTURE_SIDE
from bildung.look.attention_heads.attention_patterns import attention_patterns, moved, pooled
from bildung.look.attribution import attribute
from bildung.look.causal.causal_trace import WINDOWED, span_of
from bildung.look.causal.patching import last_logits, layer_sites
from bildung.look.contributions.input_attribution import AT_ONCE
from bildung.look.lenses.lens import lens_difference, logit_lens
from bildung.look.patchscope import patchscope_cells
from bildung.look.patchscopes.patch_targets import target_prompt
from bildung.look.patchscopes.patchscopes import ROWS, patchscope
from bildung.look.patchscopes.stream_maps import TENSORS as MAPS
from bildung.look.prompt import half
from bildung.look.saliency import METHODS, explain
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene, observe, sites
from bildung.run.loop import WORTH_PACKING

SOURCE = 32  # tokens of a source that nobody gave
DRAWN = 100  # bytes that drawing takes for each point of a picture


def attention_passes(look: Look) -> list[Pass]:
    """`look attention`."""
    given = look.given
    lms = [look.read(path, precise=True) for path in (look.source, given.against) if path is not None]
    ids = look.ids(lms[0], given.chat, given.max_tokens)

    def run(lms: list[LanguageModel]) -> Any:
        seen = []
        for lm in lms:
            encodes = given.stack == "encoder" and hasattr(lm.model, "encode")
            reader, read = (stack_in(lm, "encoder", ()), ids) if encodes else told(lm, ids)
            seen.append(attention_patterns(reader, read, max_tokens=len(read)))
        scores = [one.scores() for one in seen]
        if len(seen) > 1:
            return seen, scores, moved(*seen), pooled(seen[1].probs_NHLS - seen[0].probs_NHLS, PICTURE_SIDE)
        return seen, scores, pooled(seen[0].probs_NHLS, PICTURE_SIDE)

    config = lms[0].config
    heads = config.num_hidden_layers * config.num_attention_heads
    patterns = len(lms) * heads * len(ids) ** 2 * 4
    side = min(len(ids), PICTURE_SIDE)
    drawn = int(heads * (side + max(1, side // 12)) ** 2 * DRAWN)  # every head's square and the gap beside it
    look.later |= {"patterns": patterns, "the page": patterns, "the picture": PICTURE + drawn}
    return [Pass(f"one text of {len(ids)} tokens, every head's pattern kept", run)]


def logit_lens_passes(look: Look) -> list[Pass]:
    """`look logit_lens`."""
    given = look.given
    lms = [look.read(path, precise=True) for path in (look.source, given.against) if path is not None]
    ids = look.ids(lms[0], given.chat, given.max_tokens)
    for tuned in (given.tuned, given.against_tuned):
        if tuned is not None:
            held = sum(one.stat().st_size for one in tuned.expanduser().glob("*.safetensors"))
            look.parts["tuned lens"] = look.parts.get("tuned lens", 0) + held

    def run(lms: list[LanguageModel]) -> Any:
        told_all = [told(lm, ids) for lm in lms]
        read = told_all[0][1]
        if len(lms) > 1:
            return lens_difference(told_all[0][0], told_all[1][0], read, max_tokens=len(read))
        return logit_lens(told_all[0][0], read, max_tokens=len(read))

    layers = lms[0].config.num_hidden_layers
    look.later["the picture"] = PICTURE
    return [Pass(f"one text of {len(ids)} tokens, its stream unembedded after each of {layers} layers", run)]


def saliency_passes(look: Look) -> list[Pass]:
    """`look saliency`."""
    given = look.given
    lm = look.read(look.source, "float32")
    ids = look.ids(lm, given.chat, given.max_tokens)
    attends = any(site.endswith("attn.probs") for site in lm.model.sites)
    found = []
    for method in given.methods or [one for one in METHODS if one != "rollout" or attends]:

        def run(lms: list[LanguageModel], method: Any = method) -> Any:
            at_once = min(AT_ONCE, given.points)
            answer = [lms[0].config.decoder_start_token_id] if hasattr(lms[0].model, "given") else ""
            return explain(lms[0], ids, answer=answer, methods=[method], points=at_once, max_tokens=len(ids))

        times = math.ceil(given.points / AT_ONCE) if method == "integrated_gradients" else 1
        rows = f"{min(AT_ONCE, given.points)} points of the path at a time, " if times > 1 else ""
        what = f"{method.replace('_', ' ')}: {rows}one text of {len(ids)} tokens"
        found.append(Pass(what, run, times, back=method != "rollout"))
    return found


def attribution_passes(look: Look) -> list[Pass]:
    """`look attribution`."""
    given = look.given
    lm = look.read(look.source, "float32")
    ids = look.ids(lm, given.chat, given.max_tokens)

    def run(lms: list[LanguageModel]) -> Any:
        answer = [lms[0].config.decoder_start_token_id] if hasattr(lms[0].model, "given") else ""
        return attribute(lms[0], ids, answer=answer, max_tokens=len(ids))

    return [Pass(f"one text of {len(ids)} tokens, every writer's output kept", run)]


def trace_passes(look: Look) -> list[Pass]:
    """`look trace`."""
    given = look.given
    lm = look.read(look.source, "float32")
    if look.assumed & {"prompt", "subject"}:
        ids, (start, stop) = look.ids(lm, limit=given.max_tokens), (1, 3)
        look.say("subject: 2 of its tokens")
    else:
        ids, (start, stop) = span_of(lm, given.prompt, given.subject)
    question = asked(lm)
    places = {place: layer_sites(question, place) for place in given.sites}

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        model = asked(lms[0])
        tokens_1L = torch.tensor([ids], device=model.device)
        token_vectors: Any = model.embedding.weight
        vectors_VD = token_vectors.float() * float(getattr(model.config, "embed_scale", 1.0))
        sigma = vectors_VD.std().item()
        with observe(model, [name for some in places.values() for name in some]) as seen:
            last_logits(model, tokens_1L).float().softmax(-1)
        kept = dict(seen)

        def corrupt(x_RLD: Any) -> Any:
            x_RLD = x_RLD.clone()
            x_RLD[:, start:stop] += sigma
            return x_RLD

        def put_back(name: str) -> Any:
            def tap(x_RLD: Any) -> Any:
                x_RLD = x_RLD.clone()
                x_RLD[:, -1] = kept[name][0, -1]
                return x_RLD

            return tap

        windowed = next((some for place, some in places.items() if place.endswith(WINDOWED)), [])
        names = windowed[: given.window] or next(iter(places.values()))[:1]
        edits = {f"{stack_prefix(model)}embed": corrupt, **{name: put_back(name) for name in names}}
        with intervene(model, edits):
            last_logits(model, tokens_1L.expand(given.samples, -1)).float().softmax(-1)
        return vectors_VD

    look.later["the picture"] = PICTURE
    times = 1 + sum(len(names) * len(ids) for names in places.values())
    what = f"{given.samples} rows of noise, {len(ids)} tokens; a run for each of {len(places)} sites, layer and token"
    return [Pass(what, run, times)]


def patchscope_passes(look: Look) -> list[Pass]:
    """`look patchscope`."""
    given = look.given
    lm = look.read(look.source, given.dtype)
    if given.into is not None:
        look.read(given.into, given.dtype)
    if given.map is not None:
        look.parts["maps"] = (given.map.expanduser() / MAPS).stat().st_size
    ids = look.ids(half(lm, given.stack), given.chat, given.max_tokens)

    def prepared(lms: list[LanguageModel]) -> Any:
        source, into = half(lms[0], given.stack), half(lms[-1], given.target_stack)
        target = target_prompt(into, given.target, given.target_position)
        positions = range(len(ids)) if given.across == "position" else [len(ids) - 1]
        return source, into, target, patchscope_cells(source, into, list(positions), given, None)[0]

    def run(lms: list[LanguageModel]) -> Any:
        source, into, target, cells = prepared(lms)
        if source.config.hidden_size != into.config.hidden_size:
            return patchscope(into, target.tokens, target, [type(cells[0])(0, 0, 0)] * min(ROWS, len(cells)))
        return patchscope(source, ids, target, cells, into=into)

    look.later["the picture"] = PICTURE
    _, into, target, cells = prepared(look.lms)
    found = [Pass(f"{len(cells)} runs of {len(target.tokens)} tokens, {min(ROWS, len(cells))} at a time", run)]
    if given.new_tokens and hasattr(into.model, "kv_cache"):
        found.append(writing(look, -1, min(ROWS, len(cells)), len(target.tokens), given.new_tokens, len(cells)))
    return found


def writing(look: Look, number: int, rows: int, prompt: int, new_tokens: int, answers: int | None = None) -> Pass:
    """One of the models (by its number) writes: packed matrices, keys and values, and the prompt's activations. What is
    timed is the reading."""
    model = look.lms[number].model
    packs = model.device.type == "cpu" and new_tokens >= WORTH_PACKING
    beside = {"packed matrices": packed_bytes(model, model.dtype.itemsize)} if packs else {}

    def run(lms: list[LanguageModel]) -> Any:
        model = lms[number].model
        if hasattr(model, "given"):
            return model.encode(torch.zeros(rows, prompt, dtype=torch.long, device=model.device))
        with torch.no_grad():
            cache = model.kv_cache(rows, prompt + new_tokens)
            tokens_BL = torch.zeros(rows, prompt, dtype=torch.long, device=model.device)
            return cache, model.unembed(model.hidden(tokens_BL, kv_cache=cache)[:, -1]).float()

    what = f"{rows} prompts of {prompt} tokens are read, of which {new_tokens} tokens each are written"
    return Pass(what, run, None if answers is None else math.ceil(answers / rows), beside=beside)


def alignment_passes(look: Look) -> list[Pass]:
    """`look alignment`."""
    lm = look.read(look.source)
    looks = [site for site in sites(lm.model) if site.endswith("cross.probs")]
    if not looks:
        raise SettingsError(f"a {lm.config.model_type} of this kind attends to no source; there is nothing to draw.")
    texts = [len(lm.tokenizer.encode(text)) + 1 for text in look.given.source] or [SOURCE]
    if not look.given.source:
        look.say(f"source: one of {SOURCE} tokens")

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        model = lms[0].model
        given = model.given(torch.zeros(1, max(texts), dtype=torch.long, device=model.device))
        with observe(model, looks[-1]) as seen:
            given(torch.zeros(1, look.given.new_tokens, dtype=torch.long, device=model.device))
        return seen

    what = f"a source of {max(texts)} tokens and an answer of {look.given.new_tokens}, read once more when written"
    return [Pass(what, run, len(texts))]


def image_attention_passes(look: Look) -> list[Pass]:
    """`look image_attention`."""
    lm = look.read(look.source)
    if lm.config.kind != "vision":
        raise DataError(f"{look.source} is a {lm.config.model_type}, which does not read images.")
    shape, size = lm.config.image, look.given.size
    has_processor = (look.source / "preprocessor_config.json").exists()
    height, width = (size, size) if size else shape.image_size
    if not size and not look.assumed and has_processor:
        from bildung.data.image_processor import decode

        height, width = read_processor(look.source).pixels(decode(look.given.image.expanduser())).shape[-2:]
    elif look.assumed:
        look.say("image: one of the model's size")

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        model = lms[0].model
        with observe(model, "layers.*.attn.probs") as seen:
            h_BLD = model.hidden(torch.zeros(1, shape.num_channels, height, width, device=model.device))
        return seen, model.classify(h_BLD) if model.classifier is not None else None

    return [Pass(f"one image of {height} x {width} points, every head's pattern kept", run)]

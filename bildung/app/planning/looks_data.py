"""The passes of looks that read many texts: what is kept of each, and where.

    probe               the vectors of all words, of every site; then one site's, split and scaled
    cache               the files that are written, which are mapped; one batch with its sites
    by_position         one model after the other beside the first, 4,096 tokens at a time
    gradient_distance   as many rows as there are, and back to the embedding
    steering            one text at a time
    stream_map          sums of products in float64, of every pair of layers, learned from and tested
    tuned_lens          a map for every layer with its gradient and Adam's two numbers, and a step's logits

Data that was given is read as the look reads it, so that its texts are counted and are as long as they are.
"""

# N vectors, F numbers of one, D hidden_size

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from bildung.app.planning.passes import PICTURE, Look, Pass
from bildung.data.tagged import read_tagged
from bildung.data.text import documents
from bildung.look.asked import stack_in
from bildung.look.by_position import BATCH_TOKENS, losses, readable
from bildung.look.gradient_distance import gradient_norms
from bildung.look.lenses.translators import TunedLens
from bildung.look.patchscopes.patchscopes import streams
from bildung.look.probe import read_texts
from bildung.look.probing import activations
from bildung.look.probing.activations import Read, text_units, vector_sites, word_units
from bildung.look.prompt import encode_text, frame_around
from bildung.look.stream_map import chosen_pairs
from bildung.look.tuned_lens import Pieces, objective
from bildung.model.store import LanguageModel
from bildung.model.taps import match_selections, observe, sites
from bildung.train.precision import COMPUTE

TEXTS = 400  # texts of data that nobody gave and no limit says how many
SENTENCE = 25  # tokens of a sentence of such data, all but one of them words
PROBE = 2.7  # copies of one site's vectors while a probe trains: the parts, and those of training scaled


def numbers_at(lm: LanguageModel, site: str) -> int:
    """How many numbers a site has for each token."""
    config = lm.config.encoder if site.startswith("encoder.") and lm.config.encoder else lm.config
    sizes = {
        "D": "hidden_size",
        "N": "num_attention_heads",
        "K": "num_key_value_heads",
        "H": "head_dim",
        "F": "intermediate_size",
        "V": "vocab_size",
    }
    count = 1
    for letter in sites(lm.model)[site].split()[2:]:
        count *= int(getattr(config, sizes[letter], 1)) if letter in sizes else 1
    return count


def probe_passes(look: Look) -> list[Pass]:
    """`look probe`."""
    given = look.given
    lm = look.read(look.source, given.dtype)
    chosen = vector_sites(lm, given.sites)
    longest = min(given.max_length, getattr(lm.config, "max_position_embeddings", None) or given.max_length)
    if "data" in look.assumed:
        count = given.limit or TEXTS
        length, vectors = (SENTENCE, SENTENCE - 1) if given.level == "word" else (longest, 1)
        look.say(f"data: {count} texts of {length} tokens, {vectors} vector{'s' * (vectors > 1)} of each")
        reads = [Read([0] * length, [[place] for place in range(1, 1 + vectors)])] * count
    elif given.level == "word":
        columns = {"words": given.words, "tags": given.tags, "tag_set": given.tag_set, "limit": given.limit}
        sentences, _ = read_tagged(given.data, **columns)
        reads = word_units(lm, sentences, given.piece or "last", longest).reads
    else:
        reads = text_units(lm, read_texts(given)[0], given.piece or "mean", longest).reads
    reads = sorted(reads, key=lambda one: len(one.tokens))
    rows, length, batches = largest_batch([len(one.tokens) for one in reads], activations.BATCH_TOKENS)
    last = max(n for n, one in enumerate(reads) if len(one.tokens) == length)
    at_once = reads[max(0, last + 1 - rows) : last + 1]
    count, item = sum(len(one.picks) for one in reads), lm.model.dtype.itemsize
    look.later["the picture"] = PICTURE
    widths = {site: numbers_at(lm, site) for site in chosen}
    twice = min(2, batches)  # a batch is read beside what is left of the one before
    others = max(0, count - twice * sum(len(one.picks) for one in at_once))  # those of the pass are made in it
    look.parts["vectors of the other texts"] = others * sum(widths.values()) * item  # in memory, or mapped from files
    look.later["the vectors"] = (count - others) * sum(widths.values()) * item
    look.later["one site's, while a probe trains"] = int(PROBE * count * max(widths.values()) * 4)

    def run(lms: list[LanguageModel]) -> Any:
        return activations.collect(lms[0], at_once * twice, chosen)

    what = f"{len(at_once)} texts of {length} tokens, {len(chosen)} sites kept (training the probes comes on top)"
    return [Pass(what, run, batches, runs=twice)]


def cache_passes(look: Look) -> list[Pass]:
    """`look cache`."""
    given = look.given
    lm = look.read(look.source)
    longest = min(given.max_length, getattr(lm.config, "max_position_embeddings", None) or given.max_length)
    if "data" in look.assumed:
        count = given.limit or TEXTS
        look.say(f"data: {count} texts of {longest} tokens")
        lengths = [longest] * count
    else:
        room = longest - (frame := frame_around(lm)).size(pair=False)
        texts = (lm.tokenizer.encode(text, bos=False)[:room] for text in documents(given.data, limit=given.limit))
        lengths = [len(frame.put(ids).tokens) for ids in texts if ids]
    if "sites" in look.assumed:
        look.say(f"sites: {', '.join(given.sites)}")
    chosen = match_selections(lm.model, given.sites)
    item = 4 if given.dtype == "float32" else 2
    for site, selection in chosen:
        shape = sites(lm.model)[site]
        at_places = selection is not None and shape.split().index("L") in selection.axes(site, shape)
        rows = len(lengths) if at_places else sum(lengths)
        held = look.parts.get("files that are written, mapped", 0)
        look.parts["files that are written, mapped"] = held + rows * numbers_at(lm, site) * item
    rows, length, batches = largest_batch(lengths, given.batch_tokens)

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        model = lms[0].model
        tokens_BL = torch.zeros(rows, length, dtype=torch.long, device=model.device)
        keep_BL = torch.ones(rows, length, dtype=torch.bool, device=model.device)
        keep_BL[:, -1] = len(set(lengths)) == 1  # texts of several lengths are padded, and masked
        with observe(model, given.sites) as seen:
            (model.encode if hasattr(model, "given") else model.hidden)(
                tokens_BL, keep_BL=None if bool(keep_BL.all()) else keep_BL
            )
        # Site by site the rows of real tokens are put together, and once more as the type of the file.
        return seen, [x.flatten(0, 1).clone() for x in list(seen.values())[:1] for _ in range(2)]

    return [Pass(f"{rows} texts of {length} tokens, {len(chosen)} sites kept", run, batches)]


def largest_batch(lengths: Sequence[int], tokens: int) -> tuple[int, int, int]:
    """(rows, length, number of batches) of neighbouring texts of at most so many tokens with their padding."""
    batches, rows, longest = [], 0, 0
    for length in lengths:
        if rows and max(longest, length) * (rows + 1) > tokens:
            batches.append((rows, longest))
            rows, longest = 0, 0
        rows, longest = rows + 1, max(longest, length)
    batches.append((rows, longest))
    most = max(batches, key=lambda one: one[0] * one[1])
    return most[0], most[1], len(batches)


def by_position_passes(look: Look) -> list[Pass]:
    """`look by_position`: the first model stays while each of the others is read."""
    given, alone = look.given, []
    for path in (look.source, *given.others):
        before = look.parts.get("weights", 0)
        look.read(path)
        alone.append(look.parts["weights"] - before)
    # A model is let go when the next but one is there: the name still holds it while that is read.
    look.parts["weights"] = alone[0] + max((sum(pair) for pair in itertools.pairwise([0, *alone[1:]])), default=0)
    rows = max(1, BATCH_TOKENS // given.length)

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        tokens_RL = torch.zeros(rows, given.length, dtype=torch.long)
        return [losses(lm, readable(lm, tokens_RL)) for lm in lms]

    return [Pass(f"{rows} rows of {given.length} tokens by each model", run, -(-given.rows // rows))]


def gradient_distance_passes(look: Look) -> list[Pass]:
    """`look gradient_distance`: one model after the other."""
    given, alone = look.given, []
    for path in (look.source, *given.against):
        before = look.parts.get("weights", 0)
        look.read(path, "float32")
        alone.append(look.parts["weights"] - before)
    look.parts["weights"] = max(sum(pair) for pair in itertools.pairwise([0, *alone]))

    def run(lms: list[LanguageModel]) -> Any:
        for lm in lms:
            gradient_norms(lm, torch.zeros(given.rows, given.length + 1, dtype=torch.long))

    return [
        Pass(f"{given.rows} rows of {given.length} tokens and back to their vectors, by each model", run, back=True)
    ]


def steering_passes(look: Look) -> list[Pass]:
    """`look steering`."""
    given = look.given
    lm = look.read(look.source)
    lengths = [min(64, given.max_tokens)] * 2
    if look.assumed & {"positive", "negative"}:
        look.say(f"positive, negative: texts of {lengths[0]} tokens")
    else:
        texts = [text for data in (given.positive, given.negative) for text in documents(data, limit=given.limit)]
        lengths = [min(given.max_tokens, len(encode_text(lm, text)[0])) for text in texts]
    if "site" in look.assumed:
        look.say(f"site: {given.site}")

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        model = lms[0].model
        with observe(model, given.site) as seen:
            model.hidden(torch.zeros(1, max(lengths), dtype=torch.long, device=model.device))
        return seen

    return [Pass(f"a text of {max(lengths)} tokens, one site kept", run, len(lengths))]


def stream_map_passes(look: Look) -> list[Pass]:
    """`look stream_map`."""
    given = look.given
    look.read(look.source, given.dtype)
    if given.target is not None:
        look.read(given.target, given.dtype)
    both = [stack_in(lm, "encoder", ()) for lm in look.lms]
    pairs = chosen_pairs(both[0], both[-1], given)
    D, E = both[0].config.hidden_size, both[-1].config.hidden_size
    look.parts["sums of products, float64"] = 2 * len(pairs) * (D * D + D * E + D + E) * 8
    look.later["the maps"] = len(pairs) * (D * E + E) * 4 + 4 * D * max(D, E) * 8

    def run(lms: list[LanguageModel]) -> Any:
        made = [streams(stack_in(lm, "encoder", ()), [0] * given.length)[0] for lm in lms]
        return made, [made[0][0].double(), made[-1][0].double(), made[0][0].new_zeros(D, D, dtype=torch.float64)]

    return [Pass(f"a piece of {given.length} tokens, the stream after every layer kept", run, given.pieces)]


def tuned_lens_passes(look: Look) -> list[Pass]:
    """`look tuned_lens`."""
    given = look.given
    lm = look.read(look.source)
    lens_bytes = (lm.config.num_hidden_layers - 1) * (lm.config.hidden_size**2 + lm.config.hidden_size) * 4
    moments = 2 if given.optimizer == "adam" else 1
    look.parts["optimizer"] = moments * lens_bytes  # the lens and its gradient are made in the pass
    if given.steps > given.checkpoint_every > 0:
        look.parts["checkpoint"] = (1 + moments) * lens_bytes

    def run(lms: list[LanguageModel]) -> Any:
        one, before = lms[0], lms[0].model.compute_dtype
        one.model.compute_dtype = COMPUTE[given.precision]
        one.model.requires_grad_(False)
        lens = TunedLens(one.config.num_hidden_layers, one.config.hidden_size, "")
        tokens_BL = torch.zeros(given.rows, given.length, dtype=torch.long, device=one.model.device)
        read = min(given.positions or tokens_BL.numel(), tokens_BL.numel())
        with torch.enable_grad():
            loss = objective(one)(lens, Pieces(tokens_BL, read)).total
            loss.backward()
        one.model.compute_dtype = before

    return [Pass(f"a step on {given.rows} rows of {given.length} tokens, all layers", run, given.steps, back=True)]

"""The passes of looks at heads, and of looks that ask a model many short questions.

    heads, induction        random tokens that come twice; the weights of all heads, grouped ones repeated
    circuits                those weights, and what each head reads of each earlier one
    in_context              keys and values of the examples, and 2,048 tokens of questions at a time
    attributes, multi_hop   vectors of names at some layers, and 128 answers at a time

The weights of all heads in float32 are as much as the attention's matrices, and more where key-value heads are shared.
"""

# N layers, D hidden_size

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from bildung.app.planning.looks_text import writing
from bildung.app.planning.measuring import in_type, rounded_bytes
from bildung.app.planning.passes import Look, Pass
from bildung.evaluate.likelihood import chunks
from bildung.evaluate.task_file import choices_of, text_of
from bildung.look.attention_heads.composition import composition
from bildung.look.attention_heads.head_scores import head_scores, repeated_tokens
from bildung.look.attention_heads.head_weights import embedding, head_weights, through, unembedding
from bildung.look.attention_heads.in_context_score import loss_by_position
from bildung.look.by_position import BATCH_TOKENS
from bildung.look.in_context import CONTENT_FREE
from bildung.look.in_context import read as read_questions
from bildung.look.induction import continuing, repeats_for
from bildung.look.multi_hop import HOPS
from bildung.look.multi_hop import questions as two_hop_questions
from bildung.look.patchscope import every
from bildung.look.patchscopes.attribute_extraction import CONTEXTS
from bildung.look.patchscopes.facts import facts, relation_of
from bildung.look.patchscopes.patchscopes import ROWS
from bildung.look.prompt import encode_text, half
from bildung.model.base import CausalLM
from bildung.model.store import DTYPES, LanguageModel, load

ASKED = 64  # questions that are answered together, to find those that a model can answer
QUESTIONS = 2048  # tokens of questions that are read together (evaluate/shared_prefix.py)


def heads_passes(look: Look) -> list[Pass]:
    """`look heads`."""
    given = look.given
    look.read(look.source, precise=True)

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        lm = half(lms[0], given.stack)
        layers = head_weights(lm.model)
        repeats = repeated_tokens(lm, stretch=given.stretch, copies=given.copies, rows=given.rows, seed=given.seed)
        seen = head_scores(lm, repeats, layers)
        if isinstance(lm.model, CausalLM):
            return layers, seen, through(embedding(lm.model), unembedding(lm.model))
        return layers, seen

    length = given.stretch * given.copies
    found = [Pass(f"{given.rows} rows of {length} random tokens, and the weights of all heads", run)]
    if given.data is not None:
        length = given.length or min(512, look.lms[0].config.max_position_embeddings)
        rows = max(1, BATCH_TOKENS // length)

        def read(lms: list[LanguageModel]) -> Any:
            return loss_by_position(lms[0], torch.zeros(rows, length, dtype=torch.long))

        found.append(Pass(f"{rows} rows of {length} tokens of text", read, math.ceil(given.text_rows / rows)))
    return found


def circuits_passes(look: Look) -> list[Pass]:
    """`look circuits`."""
    given = look.given
    look.read(look.source)

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        model = lms[0].model
        prefix = given.prefix or ("decoder." if hasattr(model, "encode") else "")
        layers = head_weights(model, prefix=prefix, distances=given.distances)
        kept = composition(layers)
        if isinstance(model, CausalLM) or prefix == "decoder.":
            e_VD = embedding(model, prefix)
            return layers, kept, through(e_VD, unembedding(model, prefix)), e_VD.T @ e_VD
        return layers, kept

    return [Pass("the weights of all heads, and every pair of them; no text is read", run)]


def induction_passes(look: Look) -> list[Pass]:
    """`look induction`."""
    given = look.given
    lm = continuing(look.read(look.source))
    length = repeats_for(lm, given).tokens_RL.shape[1]

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        one = continuing(lms[0])
        layers = head_weights(one.model)
        return layers, head_scores(one, repeats_for(one, given), layers)

    look.remarks.append("how many heads lie below the induction head, to be ablated, is known when it is found")
    return [Pass(f"{given.rows} rows of {length} random tokens, and the weights of all heads", run, None)]


def in_context_passes(look: Look) -> list[Pass]:
    """`look in_context`."""
    given = look.given
    lm = look.read(look.source)
    file, asked, pool, _ = read_questions(given)
    dtype = DTYPES[given.dtype]
    look.parts["matrices in the type of the activations"] = rounded_bytes(look, dtype)
    look.lms, look.loaders = [in_type(look, dtype)], [partial(load, look.source, given.dtype)]

    def length(row: Any) -> int:
        said = f"{text_of(file, row)}{file.target_delimiter}{choices_of(file, row)[0]}{file.fewshot_delimiter}"
        return len(lm.tokenizer.encode(said, bos=False))

    some = pool[:ASKED]
    mean = sum(map(length, some)) / max(1, len(some))
    shared = min(round(mean * max(given.shots)), lm.config.max_position_embeddings - QUESTIONS // 8)
    tokens = sum(map(length, asked)) + (len(CONTENT_FREE) * round(mean) if given.calibrate else 0)
    at_once = min(QUESTIONS, tokens)
    look.remarks.append(f"the examples take about {mean:.0f} tokens each")

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        model = lms[0].model
        cache = model.kv_cache(1, shared + at_once)
        if shared:
            model.hidden(torch.zeros(1, shared, dtype=torch.long, device=model.device), kv_cache=cache)
        tokens_1L = torch.zeros(1, at_once, dtype=torch.long, device=model.device)
        positions_1L = shared + torch.arange(at_once, device=model.device)[None] % 64
        segments_1L = torch.arange(at_once, device=model.device)[None] // 64
        h_1LD = model.hidden(tokens_1L, positions_BL=positions_1L, segments_BL=segments_1L, kv_cache=cache)
        for _, logits in chunks(model, h_1LD[0, ::8]):
            logits.float().log_softmax(-1)

    draws = sum(given.rounds * given.orders if k > 1 else given.rounds if k else 1 for k in set(given.shots))
    what = f"{shared} tokens of examples and {at_once} of questions"
    return [Pass(what, run, draws * math.ceil(tokens / QUESTIONS))]


def attributes_passes(look: Look) -> list[Pass]:
    """`look attributes`."""
    given = look.given
    lm = look.read(look.source, given.dtype)
    reader = half(lm, "encoder")
    layers, theirs = (list(some) or every(reader, given.step) for some in (given.layers, given.target_layers))
    found, vectors = [], 0
    for name in given.relations:
        relation = relation_of(name)
        known, _ = facts(relation)
        vectors = max(vectors, 2 * len(known) * len(CONTEXTS) * len(layers) * lm.config.hidden_size * 4)
        prompt = len(encode_text(lm, relation.prompt.format(known[0].subject))[0])
        runs = given.facts * len(layers) * len(theirs)
        found.append(writing(look, 0, min(ROWS, runs), prompt, given.new_tokens, runs))
    look.parts["vectors of all facts"] = vectors
    return found


def multi_hop_passes(look: Look) -> list[Pass]:
    """`look multi_hop`."""
    given = look.given
    lm = look.read(look.source, given.dtype)
    hops, reader = HOPS[given.hops], half(lm, "encoder")
    layers, theirs = (list(some) or every(reader, given.step) for some in (given.layers, given.target_layers))
    first = two_hop_questions(hops)[0]
    both = len(encode_text(lm, hops.relation.prompt.format(hops.first.format(first.given)))[0])
    runs = given.facts * len(layers) * len(theirs)
    look.parts["vectors of all questions"] = 2 * runs * lm.config.hidden_size * 4
    return [
        writing(look, 0, ASKED, both, given.new_tokens),
        writing(look, 0, min(ROWS, runs), both, given.new_tokens, runs),
    ]

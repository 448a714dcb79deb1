"""The plan of operations that change a model's files and compare the two, or measure what a model can do.

    merge      the adapter on its base while its matrices become dense; then adapter and merged model, read side by side
    quantize   the model and its quantized matrices, once more while they are written; then both, read side by side
    evaluate   the model, its matrices rounded to the card's type, and a batch of about 2,048 tokens; for answers that
               are written, packed matrices

Two models are compared in float32: matrices of another type are there a second time, in it.
"""

# B rows, L tokens, D hidden size, N places

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import torch

from bildung.app.planning.looks_text import writing
from bildung.app.planning.passes import Look, Pass, paper_model
from bildung.compress.quantize import choose
from bildung.core.hardware import Tidy
from bildung.data.text import documents
from bildung.evaluate.answers import ROWS, chat_prompt
from bildung.evaluate.card import CardSettings, load_tasks
from bildung.evaluate.compare import BATCH_TOKENS, CONTEXT, compare_batch
from bildung.evaluate.likelihood import batches, chunks, rolling
from bildung.model.base import CausalLM
from bildung.model.config import read_config
from bildung.model.count import on_paper
from bildung.model.linear import Dense
from bildung.model.quantized import METHODS
from bildung.model.quantized_store import DTYPE_NAMES
from bildung.model.store import DTYPES, LanguageModel, load
from bildung.train.ledger import paper_of, without_numbers
from bildung.tune.instruction import base_of
from bildung.tune.merge import CHARACTERS, check_is_adapter


def merge_passes(look: Look) -> list[Pass]:
    """`merge`."""
    check_is_adapter(look.source)
    given, lm = look.given, look.read(look.source)
    dtype = DTYPES[given.dtype] if given.dtype else lm.model.weight_dtype
    linears = [one for name, one in lm.model.linears().items() if not _is_tied(lm, name)]
    base = on_paper(read_config(base_of(look.source)["base"]))
    numbers = sum(one.numel() for one in base.parameters())
    dense = sum(one.in_features * one.out_features for one in linears)
    largest = max(one.in_features * one.out_features for one in linears)
    anew = dense if dtype == lm.model.weight_dtype else numbers  # everything, where the type changes
    look.later["matrices with the adapter in them"] = anew * dtype.itemsize + 3 * 4 * largest
    rounded = 0 if dtype == torch.float32 else 4 * _dense(base)
    merged = dataclasses.replace(
        lm, model=without_numbers(base.to(torch.float32), paper_of(lm.model)), tokenizer=copy.copy(lm.tokenizer)
    )
    return [*card_passes(look, given.card), *_compared(look, merged, numbers * dtype.itemsize, rounded)]


def quantize_passes(look: Look) -> list[Pass]:
    """`quantize`."""
    given, lm = look.given, look.read(look.source)
    if "method" in look.assumed:
        look.say(f"method: {given.method}")
    chosen = choose(lm, look.source, given)
    quantized = paper_model(look.source, "float32", paper=paper_of(lm.model))
    linears = quantized.model.linears()
    for name in chosen:
        linears[name].base = METHODS[given.method].quantize(linears[name].base.dense())
    stores = sum(linears[name].base.stored_bytes for name in chosen)
    item = lm.model.weight_dtype.itemsize
    rest = sum(one.numel() for one in quantized.model.parameters())
    rounded = 0 if lm.model.weight_dtype == torch.float32 else 4 * _dense(quantized.model)
    unpacked = stores if given.method == "int8" else 0  # four numbers of its file are one; nf4's are as used
    # What is left behind while they are made is given back matrix by matrix (core/hardware.py).
    look.later |= {"quantized": stores, "quantized, as it is written": stores, "not given back yet": Tidy.SLACK}
    return [*card_passes(look, given.card), *_compared(look, quantized, stores + unpacked + rest * item, rounded)]


def evaluate_passes(look: Look) -> list[Pass]:
    """`evaluate`."""
    look.read(look.source)
    if not (found := card_passes(look, look.given.card)):
        look.remarks.append("it does not continue text: its card holds no figures")
    return found


def _compared(look: Look, b: LanguageModel, written: int, rounded: int) -> list[Pass]:
    """The model that was read and what was made of it, on the largest batch of the texts that they are compared on.

    b: the second in float32. written: bytes of it when it is read. rounded: of its matrices in float32, if that is
    another type.
    """
    a = in_type(look, torch.float32)
    beside = {"the result, read": written, "matrices in float32": rounded_bytes(look, torch.float32) + rounded}
    look.lms += [a, b]
    look.loaders += [partial(load, look.source, "float32")] * 2
    if a.config.kind == "vision":
        return [Pass("no text is read: nothing is compared", lambda lms: None, beside=beside)]
    context = min(CONTEXT, a.config.max_position_embeddings)
    texts = [text[:CHARACTERS] for text in documents(look.given.compare_on, limit=look.given.compare_texts)]
    if not isinstance(a.model, CausalLM) and not hasattr(a.model, "given"):
        longest = min(context, max(len(a.tokenizer.encode(text)) + 2 for text in texts))

        @torch.no_grad()
        def states(lms: list[LanguageModel]) -> Any:
            tokens_1L = torch.zeros(1, longest, dtype=torch.long, device=lms[-1].model.device)
            return [one.model.hidden(tokens_1L).double() for one in lms[-2:]]

        return [Pass(f"both on a text of {longest} tokens", states, len(texts), runs=2, beside=beside)]
    pieces = [piece for text in texts for piece in rolling(a.tokenizer, text, context)]
    groups = batches([len(piece) - 1 for piece in pieces], BATCH_TOKENS)
    largest = [pieces[index] for index in groups[0]]

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        return compare_batch(lms[-2], lms[-1], largest, torch.zeros(len(largest), dtype=torch.long))

    what = f"both on {len(largest)} texts of up to {max(len(piece) - 1 for piece in largest)} tokens"
    return [Pass(what, run, len(groups), beside=beside)]


def card_passes(look: Look, card: CardSettings | None) -> list[Pass]:
    """What the card measures, of the model that was read: its largest batch, and the longest answers."""
    lm = look.lms[0]
    if card is None or not isinstance(lm.model, CausalLM):
        return []
    dtype = DTYPES[card.dtype]
    number = len(look.lms)
    beside = {f"matrices in {card.dtype}": rounded_bytes(look, dtype)}
    look.lms.append(in_type(look, dtype))
    look.loaders.append(partial(load, look.source, card.dtype))
    context = min(card.context, lm.config.max_position_embeddings)
    rows = max(1, card.batch_tokens // context)

    @torch.no_grad()
    def run(lms: list[LanguageModel]) -> Any:
        model = lms[number].model
        h_BLD = model.hidden(torch.zeros(rows, context, dtype=torch.long, device=model.device))
        for _, logits_CV in chunks(model, h_BLD.flatten(0, 1)):
            torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32).argmax(dim=-1)
        return h_BLD

    found = [Pass(f"{rows} rows of {context} tokens of the card's tasks", run, None, beside=beside)]
    room = lm.config.max_position_embeddings
    asked = [([len(chat_prompt(lm.tokenizer, one)) for one in card.sample_prompts], card.sample_tokens)]
    for task in (one for one in load_tasks(lm, card)[0] if one.generates):
        lengths = [len(lm.tokenizer.encode(question.context)) for question in task.questions]
        asked.append((lengths, task.file.generation_kwargs.max_gen_toks))
    for lengths, new_tokens in asked:
        if lengths := [length for length in lengths if length + new_tokens <= room]:
            one = writing(look, number, min(ROWS, len(lengths)), max(lengths), new_tokens, len(lengths))
            found.append(dataclasses.replace(one, beside={**one.beside, **beside}))
    return found


def in_type(look: Look, dtype: torch.dtype) -> LanguageModel:
    """The model that was read, on paper in another type."""
    lm = look.lms[0]
    if lm.model.dtype == dtype:
        return lm
    made = paper_model(look.source, DTYPE_NAMES[dtype], paper=paper_of(lm.model))
    return dataclasses.replace(made, tokenizer=lm.tokenizer)


def rounded_bytes(look: Look, dtype: torch.dtype) -> int:
    """Bytes of what evaluate.likelihood.evaluating rounds once, of the model that was read."""
    model = look.lms[0].model
    return 0 if model.weight_dtype == dtype else dtype.itemsize * _dense(model)


def _dense(model: Any) -> int:
    """How many numbers its dense matrices have."""
    bases = [one.base for one in model.linears().values() if isinstance(one.base, Dense)]
    return sum(weight.numel() for weight in {id(one.weight): one.weight for one in bases}.values())


def _is_tied(lm: LanguageModel, name: str) -> bool:
    return name == "lm_head" and bool(getattr(lm.config, "tie_word_embeddings", False))

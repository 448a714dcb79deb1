"""Repair of reasoning in two hops: read the first hop alone, and hand its result to the second as a vector.

    bildung look multi_hop MODEL OUT                    the capital of the country whose people are called ...
    bildung look multi_hop MODEL OUT --hops currency    the currency of the country whose capital is ...

    both at once   "The official currency of the country whose capital is Paris"        -> ?
    repaired       "the country whose capital is Paris"   last token, after layer l     h
                   "The official currency of x"           h put in for x after layer l*  -> the euro

(Ghandeharioun et al. 2024, section 5: 19.6 % right at once, 50 % repaired, of questions whose two hops the model
answers one by one.) Right is who is right for any pair of layers, as in the paper; beside it stand one pair of layers,
chosen on the other half of the questions, pairs with l < l*, and how often the same texts say another's answer: with
hundreds of pairs and few currencies, some text says almost anything. Shares have standard errors over questions. The
paper masks the attention of one text that holds both hops; here the hops are two texts, as in the authors' notebook.

OUT gets multi_hop.html (one file, works offline), multi_hop.png and multi_hop.json with every text.
"""

# S questions, N source layers, T target layers

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint, rows
from bildung.look.asked import stack_prefix
from bildung.look.lenses.lens import check_writes
from bildung.look.pages.grid_page import draw_grids
from bildung.look.pages.page import command_of, look_page
from bildung.look.patchscope import every
from bildung.look.patchscopes.attribute_extraction import others_said, right_elsewhere
from bildung.look.patchscopes.facts import RELATIONS, Fact, Relation, facts, says
from bildung.look.patchscopes.patch_targets import target_prompt
from bildung.look.patchscopes.patchscopes import check_layer, patched_texts
from bildung.look.probing.activations import Read, collect
from bildung.look.prompt import encode_text, frame_around, half
from bildung.model.store import LanguageModel, load
from bildung.run.write import write


@dataclass(frozen=True)
class Hops:
    """first: what names a country by the column `given`; relation: what is asked of it."""

    first: str
    given: str
    relation: Relation


HOPS = {
    "capital": Hops("the country whose people are called {}", "demonym", RELATIONS["capital"]),
    "currency": Hops("the country whose capital is {}", "capital", RELATIONS["currency"]),
}


@settings_class
class Settings:
    """Two-hop repair."""

    hops: Literal["capital", "currency"] = "capital"  # what is asked of a country named by its people or its capital
    facts: int = 24  # questions whose two hops the model answers one by one
    layers: tuple[int, ...] = ()  # of the first hop; default: every step-th and the last
    target_layers: tuple[int, ...] = ()  # of the second; default: the same
    step: int = 4
    new_tokens: int = 8  # that each run writes
    dtype: Literal["float32", "bfloat16"] | None = None  # type to load the model in; default: as stored
    seed: int = 0  # which questions


@dataclass(frozen=True)
class Question:
    """Paris -> France -> euro."""

    given: str
    middle: str
    answer: str


@dataclass
class Repair:
    """What was found. at_once_S: right without a patch; hits_SNT: with one."""

    questions: list[Question]
    asked: int
    layers: list[int]
    target_layers: list[int]
    at_once_S: Tensor
    texts: list[str]
    hits_SNT: Tensor
    others_SN: Tensor  # share of the other questions' answers that any target layer's text says
    others_S: Tensor  # that the text of any pair of layers says


def multi_hop(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page, the picture and the numbers. Raises SettingsError, NoSuchSite, DataError."""
    if settings.facts < 2 or settings.new_tokens < 1 or settings.step < 1:
        raise SettingsError("facts is at least 2, new_tokens and step at least 1.")

    def work(job: Job) -> None:
        lm = load(source, settings.dtype)
        found = repair(lm, settings)
        numbers = as_json(found, HOPS[settings.hops], Path(source).name, command_of(job))
        (job.out / "multi_hop.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", "utf-8")
        draw_grids({**numbers, "grids": [numbers["grid"]]}, job.out / "multi_hop.png")
        (job.out / "multi_hop.html").write_text(page(numbers), encoding="utf-8")
        job.measured = numbers["measured"]
        print(f"{len(found.questions)} questions, of {found.asked} asked")
        for name, (mean, error) in numbers["shares"].items():
            print(f"{name}: {mean:.3f} ± {error:.3f}")

    data = fingerprint(HOPS[settings.hops].relation.data)
    return perform("look multi_hop", source, out, settings, work, data=data, force=force)


def questions(hops: Hops) -> list[Question]:
    """Every country of which both are known, but where what is given names two countries or says the answer."""
    answer = {fact.subject: fact.object for fact in facts(hops.relation)[0]}
    given = {str(row["name"]): str(row[hops.given]) for row in rows(hops.relation.data) if row.get(hops.given)}
    often = Counter(given.values())
    return [
        Question(text, name, answer[name])
        for name, text in given.items()
        if name in answer and often[text] == 1 and not says(f"{text}, {name}", answer[name])
    ]


def repair(lm: LanguageModel, given: Settings) -> Repair:
    """Ask, patch and ask again. Raises DataError when the model answers the two hops of fewer than two questions."""
    check_writes(lm, answers=True)
    reader = half(lm, "encoder")  # of an encoder-decoder the half that reads questions
    layers, theirs = (list(some) or every(reader, given.step) for some in (given.layers, given.target_layers))
    for layer in [*layers, *theirs]:
        check_layer(reader, layer, "model")
    lm.model.eval()
    hops = HOPS[given.hops]
    second = hops.relation.prompt
    all_questions = questions(hops)
    order = torch.randperm(len(all_questions), generator=torch.Generator().manual_seed(given.seed)).tolist()
    chosen, asked = answered_one_by_one(lm, [all_questions[i] for i in order], given)
    at_once = ask(lm, [second.format(hops.first.format(one.given)) for one in chosen], given.new_tokens)
    sites = [f"{stack_prefix(reader.model)}layers.{layer}.resid_post" for layer in layers]
    reads = [encode_text(lm, hops.first.format(one.given))[0] for one in chosen]
    last = 1 + len(frame_around(lm).after)
    vectors = collect(lm, [Read(tokens, [[len(tokens) - last]]) for tokens in reads], sites)
    h_SND = torch.stack([vectors[site] for site in sites], 1)
    h_RE = h_SND.flatten(0, 1).repeat_interleave(len(theirs), 0).to(lm.model.device, lm.model.dtype)
    into = theirs * (len(chosen) * len(layers))
    texts = patched_texts(reader, target_prompt(reader, second), h_RE, into, given.new_tokens)
    shape = (len(chosen), len(layers), len(theirs))
    hits = [says(text, chosen[r // (shape[1] * shape[2])].answer) for r, text in enumerate(texts)]
    right = torch.tensor([says(text, one.answer) for text, one in zip(at_once, chosen, strict=True)])
    stated = [Fact(one.given, one.answer) for one in chosen]
    others_SN = others_said(texts, stated, shape)
    others_S = others_said(texts, stated, (shape[0], 1, shape[1] * shape[2]))[:, 0]
    return Repair(chosen, asked, layers, theirs, right, texts, torch.tensor(hits).view(shape), others_SN, others_S)


def ask(lm: LanguageModel, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """What the model writes after each."""
    found = write(lm.model, lm.tokenizer, [encode_text(lm, prompt)[0] for prompt in prompts], new_tokens)
    return [answers[0].text for answers in found]


def answered_one_by_one(lm: LanguageModel, some: Sequence[Question], given: Settings) -> tuple[list[Question], int]:
    """(the first questions of whose hops each is answered alone, how many were asked)."""
    known: list[Question] = []
    asked = 0
    for start in range(0, len(some), 64):
        part = some[start : start + 64]
        hops = HOPS[given.hops]
        first = ask(lm, [f"T{hops.first[1:]} is".format(one.given) for one in part], given.new_tokens)
        second = ask(lm, [hops.relation.prompt.format(one.middle) for one in part], given.new_tokens)
        asked += len(part)
        known += [
            one for one, a, b in zip(part, first, second, strict=True) if says(a, one.middle) and says(b, one.answer)
        ]
        if len(known) >= given.facts:
            break
    if len(known) < 2:
        raise DataError(
            f"of {asked} questions the model answers both hops of {len(known)}, each alone; at least two are needed."
        )
    return known[: given.facts], asked


def as_json(found: Repair, hops: Hops, model: str, command: str) -> dict[str, Any]:
    """Everything the page and the picture show. shares: {measure: [mean, standard error over questions]}."""
    hits_SNT, others_SN = found.hits_SNT, found.others_SN
    upward_NT = torch.tensor(found.layers)[:, None] < torch.tensor(found.target_layers)
    one_S = right_elsewhere(hits_SNT.flatten(1)[:, None])[:, 0]
    shares = {
        "right at once": _share(found.at_once_S),
        "repaired, any pair of layers": _share(hits_SNT.flatten(1).any(-1)),
        "others' answers, any pair of layers": _share(found.others_S),
        "repaired, any pair with l < l*": _share((hits_SNT & upward_NT).flatten(1).any(-1)),
        "repaired, one pair chosen on the other half": _share(one_S),
        "gained by that pair": _share(one_S - found.at_once_S.double()),
        "others' answers, any target layer, best layer": _share(others_SN[:, int(others_SN.mean(0).argmax())]),
    }
    measured: dict[str, Any] = {
        "questions whose hops are answered one by one": len(found.questions),
        "of": found.asked,
    }
    for name, (mean, error) in shares.items():
        measured |= {name: mean, f"{name}, standard error": error}
    per = hits_SNT.shape[1] * hits_SNT.shape[2]
    best = int(hits_SNT.double().mean(0).argmax())
    layer, target_layer = found.layers[best // hits_SNT.shape[2]], found.target_layers[best % hits_SNT.shape[2]]
    grid = {
        "title": "repaired",
        "note": "share right; source layer by target layer",
        "corner": "layer",
        "columns": list(map(str, found.target_layers)),
        "rows": list(map(str, found.layers)),
        "values": [[round(value, 4) for value in row] for row in hits_SNT.double().mean(0).tolist()],
        "neutral": 0.0,
    }
    rows = [
        [one.given, one.middle, one.answer, bool(found.at_once_S[s]), found.texts[s * per + best]]
        for s, one in enumerate(found.questions)
    ]
    return {
        "title": "two-hop repair", "metric": "right answers", "model": model, "measured": measured, "shares": shares,
        "grid": grid, "rows": rows, "texts": found.texts, "prompts": [hops.first, hops.relation.prompt],
        "where": f"layer {layer} into {target_layer}", "command": command,
    }  # fmt: skip


def _share(right_S: Tensor) -> list[float]:
    values = right_S.double()
    return [round(float(values.mean()), 4), round(float(values.std(correction=1)) / math.sqrt(len(values)), 4)]


def page(numbers: dict[str, Any]) -> str:
    """multi_hop.html."""
    grid, measured = numbers["grid"], numbers["measured"]
    facts_line = [(name, measured[name]) for name in list(measured)[:2]]
    facts_line += [(name, f"{mean:.2f} ± {error:.2f}") for name, (mean, error) in numbers["shares"].items()]
    cells = [
        [{"text": f"{v:.2f}", "v": v, "style": "strong" if v > 0.66 else "", "title": f"{v:.3f}"} for v in row]
        for row in grid["values"]
    ]
    return look_page("multi_hop.html", **{**numbers, "facts": facts_line, "grid": grid | {"cells": cells}})

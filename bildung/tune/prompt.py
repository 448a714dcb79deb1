"""Prompt tuning: m vectors before the token vectors are all that trains (Lester et al. 2021, arXiv 2104.08691).

    [ p1 p2 ... pm ] t1 t2 ... tL         p: trained, m * hidden_size numbers; the model stays as it is

The vectors start as tokens do, since what lies elsewhere means nothing to the layers (the paper's section 3.2, and
peft's own benchmark: 5.7 % of GSM8K from random numbers, 34.3 % from sampled tokens):

    text          the tokens of a written prompt, repeated or cut to the length asked for; the paper's class labels
    vocabulary    sampled among the 5,000 first ordinary tokens of the vocabulary, which are its most common ones
    random        uniform in [-0.5, 0.5]

With text and no `length`, training starts at the model that reads the written prompt first, exactly. The virtual tokens
stand before everything, BOS included, at positions 0 .. m-1, as in peft. The result is a directory in PEFT's format.
An encoder-decoder's encoder reads them before its source (the paper's T5). A text classifier is tuned by
`tune classify --method prompt`.

Peers: peft starts from N(0, 1) unless told otherwise and samples from the whole vocabulary. Below a billion parameters
prompt tuning stays behind full tuning (the paper's figure 1).
"""

# M virtual tokens, D hidden_size

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from bildung.core.errors import AdapterError, SettingsError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model import adapter_file
from bildung.model.adapter_prompt import check_family
from bildung.model.store import LanguageModel, load, write_model
from bildung.model.virtual import Prompt, Virtual, add_virtual, check_room, stack_of, virtual_of
from bildung.train.precision import FROZEN
from bildung.tune.instruction import Tuning, train, tune

TEXT = "Read the conversation below and answer the last question correctly, clearly and to the point."
LENGTH, COMMON = 20, 5000


@settings_class
class Options:
    """A prompt of virtual tokens."""

    length: int | None = None  # virtual tokens; default: as many as the text has, 20 without text
    init: Literal["text", "vocabulary", "random"] = "text"  # what they start as
    text: str = TEXT  # init text: the written prompt
    seed: int = 0  # of the first values


@settings_class
class Settings(Tuning, Options):
    """Prompt tuning."""

    learning_rate: float = 1e-2  # at the top of the schedule


def prompt(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train virtual tokens on conversations; `out` becomes a PEFT adapter directory (PROMPT_TUNING).

    Raises AdapterError for a model without a place for them, SettingsError for more than its context, DataError.
    """

    def work(job: Job) -> None:
        lm = load(source, FROZEN[settings.precision])
        add_prompt(lm, settings)
        adapter_file.check_place(lm.model, lm.base)  # now, and not when hours of training are to be saved
        train(job, lm, settings)
        write_model(lm, job.out)

    return tune("tune prompt", source, out, settings, work, force)


def add_prompt(lm: LanguageModel, settings: Options) -> Prompt:
    """Freeze the model and put a trainable prompt before it; its first values are a function of (seed, settings)."""
    if virtual_of(lm.model) is not None:
        raise AdapterError(f"{lm.path} has virtual tokens already; start from its base, {lm.base}.")
    check_family(lm.model)
    lm.model.requires_grad_(False)
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.init == "text":
        ids = written(lm, settings.text, settings.length, Prompt)
    else:
        length = LENGTH if settings.length is None else settings.length
        check_room(lm.model, length, Prompt)
        special = set(lm.tokenizer.special_tokens.values())
        common = [i for i in range(lm.tokenizer.vocab_size) if i not in special][:COMMON]
        chosen = torch.randint(len(common), (length,), generator=generator)
        ids = [common[index] for index in chosen.tolist()]
    if settings.init == "random":
        prompt_MD = torch.rand(len(ids), lm.config.hidden_size, generator=generator) - 0.5
    else:
        stack = stack_of(lm.model, Prompt)
        prompt_MD = stack.vectors(torch.tensor(ids, device=lm.model.device), torch.float32).detach().clone()
    virtual = Prompt(prompt_MD)
    add_virtual(lm.model, virtual)
    lm.config = lm.model.config
    return virtual


def written(lm: LanguageModel, text: str, length: int | None, kind: type[Virtual]) -> Sequence[int]:
    """The token ids of a written prompt, BOS first where the model has one; repeated or cut to `length`, if given."""
    ids = lm.tokenizer.encode(text) if text.strip() else []
    if not ids:
        raise SettingsError("init = text needs a text; give one, or init vocabulary or random.")
    length = len(ids) if length is None else length
    check_room(lm.model, length, kind)
    return [ids[index % len(ids)] for index in range(length)]

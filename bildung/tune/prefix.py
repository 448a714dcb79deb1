"""Prefix tuning: keys and values before those of the text, in every layer, are all that trains.

    layer i     [ k1 .. km ] k(t1) .. k(tL)      k, v: trained, m * layers * 2 * (kv heads * head_dim) numbers
                [ v1 .. vm ] v(t1) .. v(tL)      Li & Liang 2021, arXiv 2101.00190; the model stays as it is

What they start as decides (peft's benchmark, GSM8K with Llama-3.2-3B: random 18.6 % at 1.79 nats of forgetting; from
the keys and values of a written prompt 41.6 % at 0.198):

    text      the keys and values that a written prompt leaves in the KV cache (an encoder's: when it reads the prompt
              alone): training starts at the model that has
              read it, exactly (its positions are 0 .. m-1, and keys are kept after their rotation)
    random    from numbers without meaning; through an MLP, as in the paper

Reparameterisation (the paper's section 4.3: the numbers themselves are unstable to train): what trains is a small
matrix (m, hidden) and an MLP, prefix = start + W2 tanh(W1 e + b1) + b2. The MLP is dropped after training; the file
holds keys and values. From a random start `start` is 0 and the MLP makes the prefix, as published; from a text the MLP
begins with W2 = 0 and learns what is added to it.

Of an encoder-decoder the decoder's own tokens read the prefix, not its cross-attention, as in peft; its keys depend on
the source from the second layer on, so there is no text to start from: it starts at random. A text classifier is tuned
by `tune classify --method prefix`.

(`bildung pretrain prefix` is another thing: a prefix language model, whose attention goes both ways within a prompt.)
"""

# M virtual tokens, D hidden_size, E width of the MLP, F layers * 2 * kv heads * head_dim

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bildung.core.errors import AdapterError, SettingsError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model import adapter_file
from bildung.model.adapter_prefix import check_family
from bildung.model.config import ModelConfig
from bildung.model.store import LanguageModel, load, write_model
from bildung.model.virtual import (
    Prefix,
    add_virtual,
    check_room,
    flatten,
    prefix_size,
    read_vectors,
    stack_of,
    virtual_of,
)
from bildung.train.precision import FROZEN
from bildung.tune.instruction import Tuning, train, tune
from bildung.tune.prompt import LENGTH, TEXT, written

MLP = 512


@settings_class
class Options:
    """A prefix of keys and values."""

    length: int | None = None  # virtual tokens; default: as many as the text has, 20 without text
    init: Literal["text", "random"] | None = None  # what they start as; default: text (random for encoder-decoders)
    text: str = TEXT  # init text: the written prompt
    mlp: int | None = None  # width of the MLP that makes the prefix in training, 0: none; default: 512, none with text
    seed: int = 0  # of the first values


@settings_class
class Settings(Tuning, Options):
    """Prefix tuning."""

    learning_rate: float = 1e-2  # at the top of the schedule


class Reparameterised(Prefix):
    """A prefix that an MLP makes while it is trained."""

    def __init__(self, config: ModelConfig, start_MF: Tensor, width: int, zero: bool, generator: torch.Generator):
        super().__init__(config, start_MF)
        self.prefix_MF.requires_grad_(False)
        M, D, F = self.length, config.hidden_size, start_MF.shape[1]
        self.embedding_MD = nn.Parameter(torch.randn(M, D, generator=generator))
        self.down_ED, self.down_bias_E = _linear(width, D, generator)
        self.up_FE, self.up_bias_F = _linear(F, width, generator)
        if zero:
            nn.init.zeros_(self.up_FE)
            nn.init.zeros_(self.up_bias_F)

    def values_MF(self) -> Tensor:
        h_ME = torch.tanh(self.embedding_MD @ self.down_ED.t() + self.down_bias_E)
        return self.prefix_MF + h_ME @ self.up_FE.t() + self.up_bias_F


def _linear(outputs: int, inputs: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """torch.nn.Linear's first values, U(±1/sqrt(inputs)), from a generator of our own."""
    bound = inputs**-0.5
    weight, bias = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator) for shape in ((outputs, inputs), (outputs,))
    )
    return nn.Parameter(weight), nn.Parameter(bias)


def prefix(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train keys and values on conversations; `out` becomes a PEFT adapter directory (PREFIX_TUNING).

    Raises AdapterError for a model without a place for them, SettingsError for more than its context, DataError.
    """

    def work(job: Job) -> None:
        lm = load(source, FROZEN[settings.precision])
        add_prefix(lm, settings)
        adapter_file.check_place(lm.model, lm.base)  # now, and not when hours of training are to be saved
        train(job, lm, settings)
        drop_mlp(lm)
        write_model(lm, job.out)

    return tune("tune prefix", source, out, settings, work, force)


def add_prefix(lm: LanguageModel, settings: Options) -> Prefix:
    """Freeze the model and put a trainable prefix before it; its first values are a function of (seed, settings)."""
    if virtual_of(lm.model) is not None:
        raise AdapterError(f"{lm.path} has virtual tokens already; start from its base, {lm.base}.")
    if settings.mlp is not None and settings.mlp < 0:
        raise SettingsError(f"mlp = {settings.mlp} was given; a width of at least 1, or 0 for no MLP, is needed.")
    check_room(lm.model, 1, Prefix)
    check_family(lm.model)
    answers = lm.config.kind == "encoder-decoder"
    if answers and settings.init == "text":
        raise SettingsError(
            "init = text: the keys and values of an encoder-decoder's decoder depend on the source, so a written "
            "prompt alone leaves none to start from; leave init out, or give random."
        )
    lm.model.requires_grad_(False)
    generator = torch.Generator().manual_seed(settings.seed)
    from_text = settings.init == "text" or (settings.init is None and not answers)
    width = (0 if from_text else MLP) if settings.mlp is None else settings.mlp
    if from_text:
        start_MF = _remembered(lm, settings)
    else:
        length = LENGTH if settings.length is None else settings.length
        check_room(lm.model, length, Prefix)
        shape = (length, prefix_size(lm.config))
        start_MF = torch.zeros(shape) if width else torch.randn(shape, generator=generator)
    virtual = (
        Reparameterised(lm.config, start_MF, width, from_text, generator) if width else Prefix(lm.config, start_MF)
    )
    add_virtual(lm.model, virtual)
    lm.config = lm.model.config
    return virtual


@torch.no_grad()
def _remembered(lm: LanguageModel, settings: Options) -> Tensor:
    """What the layers' caches hold after the written prompt, in float32."""
    ids = torch.tensor(written(lm, settings.text, settings.length, Prefix), device=lm.model.device)
    backbone = stack_of(lm.model, Prefix)
    return flatten(read_vectors(backbone, backbone.vectors(ids, lm.model.weight_dtype))).float()


def drop_mlp(lm: LanguageModel) -> None:
    """Keep what the MLP made, and not the MLP."""
    made = virtual_of(lm.model)
    if isinstance(made, Reparameterised):
        add_virtual(lm.model, Prefix(lm.config, made.values_MF().detach()))

"""Maximal update parametrisation (muP): the learning rate that suits a narrow model suits a wide one (Yang et al. 2022,
arXiv 2203.03466, table 3 for Adam).

For a model m times as wide as the base, of which σ and η are the start and the learning rate:

                               start        learning rate      one step then changes what comes out by
    embeddings, vectors        σ            η                  a constant, each number on its own
    matrices inside            σ / √m       η / m              a constant: a sum over m times as many, all of one mind
    unembedding                σ / m        η / m              a constant
    scores of attention        · √H₀ / H in place of 1 / √H, where heads grow wider than the base's H₀

With one σ and η for all widths, a step changes the output of every matrix by m times as much, so wide models need lower
rates, and another one at every size.

Table 3 is the form without factors in the forward pass, so the directory is an ordinary one, and every library that
reads a Llama computes the same. (Table 8 has the same training with factors; the one that it puts on the logits, which
lets the unembedding be tied, no such config.json can say. So tied models are refused here.) The scores' factor goes
into W_q, its start and its learning rate. Weight decay takes ηλ of a weight per step; λ becomes mλ where η becomes
η / m, so that it takes as much from wide models (as in the authors' mup package).

Muon makes every update orthogonal, times 0.2·√(larger side) (train/muon.py): its effect grows with √m, and its rate is
η / √m.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bildung.core.errors import SettingsError
from bildung.model.base import CausalLM

Factors = tuple[float, float]  # of the start, of the learning rate


def factors(model: Any, base_width: int, base_head_dim: int | None = None, *, muon: bool = False) -> dict[str, Factors]:
    """Parameter name -> factors on its start and its learning rate. Raises SettingsError for what muP cannot be put on.

    base_width: hidden_size of the model that start and learning rate were found for. base_head_dim: its head_dim, if
    heads are wider here and not more.
    """
    config = model.config
    if not isinstance(model, CausalLM) or config.kind != "decoder":
        raise SettingsError(f"muP is for decoders; a {config.model_type} is of kind {config.kind!r}.")
    if config.tie_word_embeddings:
        raise SettingsError(
            "muP needs `tie_word_embeddings: false` in the model's keys: as embedding a matrix keeps its learning rate "
            "over widths, as unembedding the rate falls, and a tied one is both."
        )
    scores = ((base_head_dim or config.head_dim) / config.head_dim) ** 0.5
    if scores != 1 and config.qk_norm:
        raise SettingsError(f"a {config.model_type} normalises its queries: give muP no other head_dim than its own.")
    m = config.hidden_size / base_width
    inside = (m**-0.5, m**-0.5 if muon else 1 / m)
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith("lm_head."):
            start, rate = (1 / m, 1 / m) if parameter.ndim == 2 else (1.0, 1.0)
        elif ".layers." in name and parameter.ndim == 2:
            start, rate = inside
        else:
            start, rate = 1.0, 1.0
        factor = scores if ".q_proj." in name else 1.0
        found[name] = (start * factor, rate * factor)
    return found


def start(model: Any, by_name: Mapping[str, Factors]) -> None:
    """Put the factors on weights that were just drawn."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(by_name[name][0])


def at_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, by_name: Mapping[str, Factors]
) -> torch.optim.Optimizer:
    """The same optimizer, its groups cut into parts of one learning rate each, the highest first."""
    rates = {parameter: by_name[name][1] for name, parameter in model.named_parameters()}
    optimizer.param_groups[:] = [
        {
            **group,
            "params": [parameter for parameter in group["params"] if rates[parameter] == rate],
            "lr": group["lr"] * rate,
            "weight_decay": group["weight_decay"] / rate,
        }
        for group in optimizer.param_groups
        for rate in sorted({rates[parameter] for parameter in group["params"]}, reverse=True)
    ]
    return optimizer

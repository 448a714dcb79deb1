"""A value head: one number per position, such as how much reward a policy may still expect there (PPO's critic).

    tokens -> blocks -> final norm -> h ─┬─ unembed -> logits of the next token
                                         └─ value   -> v = w · h + b                  Ziegler et al. 2019, section 2.1

It is attached at the final norm (site "norm"), changes nothing there, and so is part of the model's parameters, of a
saved directory and of what DDP and ZeRO share out (tensor parallelism refuses attached modules).

It begins at 0: the first values say nothing, instead of something at random, while its slope is h at once. TRL's
AutoModelForCausalLMWithValueHead draws it at random, in front of it a dropout of 0.1, and writes it into the weights'
file as v_head.summary; here the model's own files stay those that transformers opens.
"""

# B batch, L length, D hidden_size

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.model.base import CausalLM
from bildung.model.taps import Attachment, attach

SITE = "norm"


class ValueHead(Attachment):
    """`value(h_BLD) -> BL`, float32; what passes at its site passes unchanged."""

    def __init__(self, size: int):
        super().__init__()
        self.settings: dict[str, Any] = {"size": size}
        self.weight_D, self.bias_1 = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(1))

    def forward(self, h_BLD: Tensor) -> Tensor:
        return h_BLD

    def value(self, h_BLD: Tensor) -> Tensor:
        """w · h + b in float32: a sum of returns needs more digits than bfloat16 has."""
        return F.linear(h_BLD.float(), self.weight_D.float()[None], self.bias_1.float())[..., 0]


def add_value_head(model: CausalLM) -> ValueHead:
    """Attach one. Raises BadIntervention where there is one already, NoSuchSite for a model without a final state."""
    head = ValueHead(model.config.hidden_size).to(model.device)
    attach(model, SITE, head)
    return head


def values(model: CausalLM, h_BLD: Tensor) -> Tensor:
    """The value at each position, BL float32, of final-norm states (`model.hidden`): one forward pass gives logits and
    values. Raises SettingsError for a model without a value head."""
    attached: Any = model.attached
    head = attached[SITE] if SITE in attached else None  # noqa: SIM401  (a ModuleDict has no get)
    if not isinstance(head, ValueHead):
        raise SettingsError("this model has no value head; attach one with value_head.add_value_head(model).")
    return head.value(h_BLD)

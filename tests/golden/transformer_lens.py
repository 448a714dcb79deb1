"""The small model and the pairs of test_transformer_lens.py, the same on every machine: nothing is drawn at random."""

from __future__ import annotations

import torch

from bildung.look.causal.prompt_pairs import Pair, Pairs
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.transformer import Decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def model_by_rule() -> Decoder:
    """A grouped-query Llama in float64 whose weights follow from their place."""
    model = build(from_dict(CONFIG), seed=0).eval().double()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            place = torch.arange(parameter.numel())
            scattered = (7 * place * place + 31 * place + 97 * number) % 1009 / 1009 - 0.5
            parameter.copy_((scattered + 1.0 * ("norm" in name)).view_as(parameter))
    return model


def pairs_by_rule(rows: int = 3, length: int = 7) -> Pairs:
    """Rows that differ in two tokens; the answer is token 5, the wrong one 9."""
    made = []
    for row in range(rows):
        clean = [(11 * row + 17 * place + place * place) % 61 for place in range(length)]
        corrupted = [(token + 23) % 61 if place in (1, 4) else token for place, token in enumerate(clean)]
        made.append(Pair(tuple(clean), tuple(corrupted), (5,), (9,)))
    return Pairs(tuple(made))

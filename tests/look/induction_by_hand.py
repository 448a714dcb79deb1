"""A two-layer model whose induction circuit is set by hand: which edges matter is known, not found.

The stream has five blocks:   token (V) | position (P) | token before (V) | answer (V) | junk (J)

    a0.h0   looks one position back (reads position), copies token -> "token before"
    a1.h0   looks where "token before" is the present token, copies token there -> "answer"
    logits  read "answer"

The other heads and the MLPs read everything and write to junk, which the logits do not read. Norms are identities, so
that nothing is coupled by a scale. Prompts differ in tokens, not in positions: a0.h0's q and k carry no difference.
"""

from __future__ import annotations

import random

import torch
from torch import nn

from bildung.look.causal.prompt_pairs import Pair, Pairs
from bildung.model.transformer import Decoder
from tests.model.tiny import tiny_decoder

V, P, J = 12, 9, 7
TOKEN, POSITION, BEFORE, ANSWER = 0, V, V + P, 2 * V + P
JUNK = 3 * V + P
D, HEADS, H = JUNK + J, 3, V
CIRCUIT = {
    ("embed", "a0.h0.v"),
    ("a0.h0", "a1.h0.k"),
    ("embed", "a1.h0.q"),
    ("embed", "a1.h0.v"),
    ("a1.h0", "logits"),
}


def induction_model() -> Decoder:
    """GPT-2's form: learned positions, so that attention by position can be written down."""
    model = tiny_decoder(
        model_type="bildung",
        vocab_size=V,
        hidden_size=D,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=H,
        max_position_embeddings=P,
        rms_norm_eps=None,
        positions="learned",
        bos_token_id=None,
        eos_token_id=None,
    )
    backbone = model.model
    eye = torch.eye(V)
    with torch.no_grad():
        backbone.embed_tokens.weight.zero_()[:, TOKEN : TOKEN + V] = eye
        backbone.embed_positions.weight.zero_()[:P, POSITION : POSITION + P] = torch.eye(P)
        model.lm_head.base.weight.zero_()[:, ANSWER : ANSWER + V] = eye
        for layer in backbone.layers:
            layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.base.weight[:JUNK] = 0  # all that is not set below goes to junk
        first, second = (layer.self_attn for layer in backbone.layers)
        for attention in (first, second):
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.base.weight[:H] = 0
            attention.o_proj.base.weight[:, :H] = 0
        back = torch.eye(P)
        first.q_proj.base.weight[1 : 1 + P, POSITION : POSITION + P] = back * 6 * H**0.5  # query of i: i + 1
        first.k_proj.base.weight[2 : 2 + P, POSITION : POSITION + P] = back  # key of i - 1: i + 1
        first.v_proj.base.weight[:H, TOKEN : TOKEN + V] = eye
        first.o_proj.base.weight[BEFORE : BEFORE + V, :H] = eye
        second.q_proj.base.weight[:H, TOKEN : TOKEN + V] = eye * 4 * H**0.5
        second.k_proj.base.weight[:H, BEFORE : BEFORE + V] = eye
        second.v_proj.base.weight[:H, TOKEN : TOKEN + V] = eye
        second.o_proj.base.weight[ANSWER : ANSWER + V, :H] = eye * 8
    model.model.norm = nn.Identity()
    return model


def induction_pairs(count: int = 6, seed: int = 0) -> Pairs:
    """A b ... A -> b; the corrupted prompt is made of other letters, and its answer is another."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        letters = rng.sample(range(V), V)
        clean, corrupted = [*letters[:5], letters[1]], [*letters[6:11], letters[7]]
        rows.append(Pair(tuple(clean), tuple(corrupted), (letters[2],), (letters[8],)))
    return Pairs(tuple(rows))

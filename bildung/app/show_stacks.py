"""What a drawing of a model shows: stacks of boxes, made from the parts of model/count.py and the config's choices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bildung.app.show import NORMS, Shown
from bildung.model.count import Part


@dataclass(frozen=True)
class Box:
    """One rectangle: its colour, a word, and a line in small print."""

    kind: str
    word: str
    note: str = ""


Step = tuple[list[list[Box]], list[Box]]  # branches, and what stands on the stream behind the addition


@dataclass
class Stack:
    """What stands below the blocks, in one of them, and above; `heads`: chains of boxes side by side at the top. A
    sublayer is the boxes between leaving and rejoining the stream, and those on the stream behind the addition; several
    branches run side by side. residual False: nothing is added, the boxes follow each other."""

    name: str
    below: list[Box]
    sublayers: list[Step]
    above: list[Box]
    heads: list[list[Box]]
    repeated: str
    residual: bool = True
    cross_at: float | None = None  # how high the box stands that an encoder's states enter


def stacks_of(shown: Shown) -> list[Stack]:
    """One stack, or encoder and decoder."""
    config = shown.config
    encoder = getattr(config, "encoder", None)
    if not hasattr(config, "norm_placement"):
        return _recurrent(shown)
    if encoder is None:
        return [_stack(shown, config, "", config.kind)]
    return [_stack(shown, encoder, "encoder.", "encoder"), _stack(shown, config, "decoder.", "decoder")]


def _stack(shown: Shown, config: Any, prefix: str, name: str) -> Stack:
    sizes = {part.name: part for part in shown.parts}
    layer = f"{prefix}layers.0."

    def million(*words: str) -> str:
        return _note([sizes[word] for word in words if word in sizes])

    norm = Box("norms", NORMS[config.norm])
    few = config.num_key_value_heads < config.num_attention_heads
    heads = f"{config.num_attention_heads} heads × {config.head_dim}"
    heads += f", {config.num_key_value_heads} for k and v" if few else ""
    look = "sees all" if not config.causal else "sees what is before" if not any(config.windows) else "in windows"
    size = million(f"{layer}attn.qkv", f"{layer}attn.out")
    attention = Box("attention", f"attention, {look}", f"{heads}   {size}")
    act = {"gelu_pytorch_tanh": "gelu tanh", "gelu_new": "gelu tanh"}.get(config.hidden_act, config.hidden_act)
    shape = f"{config.hidden_size} → {config.intermediate_size}, {act}{', gated' if config.gated else ''}"
    mlp = Box("feed-forward", "feed-forward", f"{shape}   {million(f'{layer}mlp')}")
    before = [norm] if config.norm_placement != "post" else []
    after = [norm] if config.norm_placement == "sandwich" else []
    behind = [norm] if config.norm_placement == "post" else []
    steps: list[Step] = [([[*before, attention, *after]], behind)]
    if config.mlp:
        steps.append(([[*before, mlp, *after]], behind))
    if config.parallel_residual:
        steps = [([[*before, attention, *after], [*before, mlp, *after]], [])]
    if config.cross:
        cross = Box("attention", "attention to the encoder", million(f"{layer}cross.qkv", f"{layer}cross.out"))
        steps.insert(1, ([[*before, cross]], behind))
    return Stack(
        name=name,
        below=_below(config, sizes, prefix, million),
        sublayers=steps,
        above=[norm] if config.final_norm else [],
        heads=[] if prefix == "encoder." else _heads(config, sizes, million),
        repeated=f"× {config.num_hidden_layers}",
    )


def _below(config: Any, sizes: dict[str, Any], prefix: str, million: Any) -> list[Box]:
    if config.kind == "vision":
        patch, (height, width) = config.image.patch_size, config.image.image_size
        boxes = [Box("embedding", f"patches {patch} × {patch} of {height} × {width}", million("patch_embed"))]
        return [*boxes, Box("embedding", "+ class token, positions", million("cls_token", "embed_positions"))]
    name = "shared" if "shared" in sizes else f"{prefix}embed_tokens"
    boxes = [Box("embedding", f"embedding {config.vocab_size:,} × {config.hidden_size}", million(name))]
    where = {
        "rope": "positions turn q and k (RoPE)",
        "alibi": "positions: ALiBi, on the scores",
        "t5": "positions: a bias on the scores",
        "none": "no positions",
    }.get(config.positions, f"+ positions, {config.positions.replace('_', ', ')}")
    extra = [f"{prefix}embed_positions", f"{prefix}token_types", f"{prefix}bias"]
    boxes.append(Box("embedding", where, million(*extra) if any(name in sizes for name in extra) else ""))
    return [*boxes, *([Box("norms", NORMS[config.norm])] if config.embed_norm else [])]


def _heads(config: Any, sizes: dict[str, Any], million: Any) -> list[list[Box]]:
    """What reads the states: one chain to tokens, one to labels of the whole text, one to labels of tokens."""
    tied = config.tie_word_embeddings
    unembedding = "the embedding, transposed" if tied else million("lm_head")
    chains = []
    for chain in (("pooler", "nsp_head", "classifier"), ("tagger",), ("transform", "lm_head")):
        boxes = []
        for head in chain:
            names = [name for name in sizes if name.split(".")[0] == head]
            word = {"lm_head": "unembedding", "nsp_head": "next sentence?"}.get(head, head)
            if names:
                note = unembedding if head == "lm_head" else million(*names)
                boxes.append(Box("unembedding, heads", word, note))
        chains.append(boxes)
    return [chain for chain in chains if chain]


# ── models that are no stack of Transformer blocks ──────────────────────────────────────────────────────────────────

WORDS = {"combine": "state and context combined", "out_proj": "to the embedding's width", "lm_head": "unembedding"}


def _recurrent(shown: Shown) -> list[Stack]:
    """A recurrent language model, or encoder and decoder of a seq2seq model: each layer is one box."""
    config = shown.config
    groups: dict[str, list[Part]] = {}
    for part in shown.parts:
        layer = re.match(r"(.*layers\.\d+|.*cross|bridge)\b", part.name)
        groups.setdefault(layer.group(1) if layer else part.name, []).append(part)
    boxes = {name: Box(kind_of(parts[0].name), _word(name, config), _note(parts)) for name, parts in groups.items()}
    if "decoder.cross" in boxes:
        note = f"{config.attention}   {boxes['decoder.cross'].note}"
        boxes["decoder.cross"] = Box("attention", boxes["decoder.cross"].word, note)
    below = [box for name, box in boxes.items() if name in ("shared", "embed_tokens")]
    if config.kind != "seq2seq":
        layers: list[Step] = [([[box]], []) for name, box in boxes.items() if "layers." in name]
        above = [box for name, box in boxes.items() if "layers." not in name and box not in below]
        return [Stack(config.kind, below, layers, above, [], "", residual=False)]
    sides: list[Step] = []
    for number in range(config.encoder_layers):
        pair = [[boxes[f"encoder.{side}_layers.{number}"]] for side in ("forward", "backward")]
        sides.append((pair, []))
    first = [boxes["decoder.cross"]] if "decoder.cross" in boxes else []
    inner = [box for name, box in boxes.items() if name.startswith("decoder.layers")]
    # Bahdanau's decoder looks before it takes a step, Luong's afterwards.
    inner = [*first, *inner] if config.attention == "bahdanau" else [*inner, *first]
    above = [box for name, box in boxes.items() if name in ("decoder.combine", "decoder.out_proj", "lm_head")]
    return [
        Stack("encoder", below, sides, [boxes["bridge"]] if "bridge" in boxes else [], [], "", residual=False),
        Stack("decoder", below, [([[box]], []) for box in inner], above, [], "", residual=False),
    ]


def _word(name: str, config: Any) -> str:
    if name in ("shared", "embed_tokens"):
        return f"embedding {config.vocab_size:,} × {config.embedding_size}"
    if name.endswith("cross"):
        return "attention to the encoder"
    cell = config.cell.upper()
    for side in ("forward", "backward"):
        if f"{side}_layers" in name:
            return f"{cell}, {side}"
    return f"{cell}, layer {name.rsplit('.', 1)[-1]}" if "layers." in name else WORDS.get(name.split(".")[-1], name)


def _note(parts: Sequence[Part]) -> str:
    parameters = sum(part.parameters for part in parts)
    return f"{parameters / 1e6:.2f} M" if parameters >= 5000 else f"{parameters:,}"


def kind_of(name: str) -> str:
    """The colour that a part has."""
    last = name.rsplit(".", 1)[-1]
    if last in ("scores", "mixing"):
        return "scores, mixing"
    if last in ("qkv", "out"):
        return "attention"
    if "cross" in name:
        return "attention"
    if last == "mlp":
        return "feed-forward"
    if "norm" in last or last.endswith("_scale"):
        return "norms"
    if any(word in name for word in ("embed", "shared", "token", "bias")):
        return "embedding"
    return "recurrence" if "layers." in name else "unembedding, heads"

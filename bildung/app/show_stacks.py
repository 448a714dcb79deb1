"""What a drawing of a model shows: stacks of boxes, made from the parts of model/count.py and the config's choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bildung.app.show import NORMS, Shown


@dataclass(frozen=True)
class Box:
    """One rectangle: its colour, a word, and a line in small print."""

    kind: str
    word: str
    note: str = ""


Step = tuple[list[list[Box]], list[Box]]  # branches, and what stands on the stream behind the addition


@dataclass
class Stack:
    """What stands below the blocks, in one of them, and above. A sublayer is the boxes between leaving and rejoining
    the stream, and those on the stream behind the addition; several `branches` run side by side."""

    name: str
    below: list[Box]
    sublayers: list[Step]
    above: list[Box]
    repeated: str
    residual: bool = True
    cross_at: float | None = None  # how high the box stands that an encoder's states enter


def stacks_of(shown: Shown) -> list[Stack]:
    """One stack, or encoder and decoder."""
    config = shown.config
    encoder = getattr(config, "encoder", None)
    if not hasattr(config, "norm_placement"):
        return [_recurrent(shown)]
    if encoder is None:
        return [_stack(shown, config, "", config.kind)]
    return [_stack(shown, encoder, "encoder.", "encoder"), _stack(shown, config, "decoder.", "decoder")]


def _stack(shown: Shown, config: Any, prefix: str, name: str) -> Stack:
    sizes = {part.name: part for part in shown.parts}
    layer = f"{prefix}layers.0."

    def million(*words: str) -> str:
        count = sum(sizes[word].parameters for word in words if word in sizes)
        return f"{count / 1e6:.2f} M" if count >= 5000 else f"{count:,}"

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
    steps: list[Step] = [([[*before, attention, *after]], behind), ([[*before, mlp, *after]], behind)]
    if config.parallel_residual:
        steps = [([[*before, attention, *after], [*before, mlp, *after]], [])]
    if config.cross:
        cross = Box("attention", "attention to the encoder", million(f"{layer}cross.qkv", f"{layer}cross.out"))
        steps.insert(1, ([[*before, cross]], behind))
    return Stack(
        name=name,
        below=_below(config, sizes, prefix, million),
        sublayers=steps,
        above=_above(shown, config, sizes, prefix, norm, million),
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


def _above(shown: Shown, config: Any, sizes: dict[str, Any], prefix: str, norm: Box, million: Any) -> list[Box]:
    boxes = [norm] if config.final_norm else []
    if prefix == "encoder.":
        return boxes
    for head in ("pooler", "transform", "nsp_head", "classifier", "tagger"):
        names = [name for name in sizes if name.split(".")[0] == head]
        if names:
            boxes.append(Box("unembedding, heads", head.replace("_head", ""), million(*names)))
    if "lm_head" in sizes:
        tied = config.tie_word_embeddings
        boxes.append(
            Box("unembedding, heads", "unembedding", "the embedding, transposed" if tied else million("lm_head"))
        )
    return boxes


def _recurrent(shown: Shown) -> Stack:
    """A model that is no stack of Transformer blocks: its parts in order."""
    boxes = [
        Box(kind_of(part.name), part.name, f"{part.shape}   {part.parameters / 1e6:.2f} M") for part in shown.parts
    ]
    inner = [box for box in boxes if "layers." in box.word]
    rest = [box for box in boxes if "layers." not in box.word]
    split = next((i for i, box in enumerate(rest) if box.kind != "embedding"), len(rest))
    steps: list[Step] = [([[box]], []) for box in inner]
    return Stack(shown.config.kind, rest[:split], steps, rest[split:], "", residual=False)


def kind_of(name: str) -> str:
    """The colour that a part has."""
    last = name.rsplit(".", 1)[-1]
    if last in ("scores", "mixing"):
        return "scores, mixing"
    if last in ("qkv", "out"):
        return "attention"
    if last == "mlp":
        return "feed-forward"
    if "norm" in last or last.endswith("_scale"):
        return "norms"
    if any(word in name for word in ("embed", "shared", "token", "bias")):
        return "embedding"
    return "recurrence" if "layers." in name else "unembedding, heads"

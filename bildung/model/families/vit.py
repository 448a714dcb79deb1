"""ViT: patches, a class token and learned positions below a pre-norm encoder (Dosovitskiy et al. 2021, 2010.11929).

The Transformer of BERT's day with its norms moved in front (no mask, GELU, biases everywhere); `ViTModel` may have a
pooler on the class token, `ViTForImageClassification` has one linear row per class instead.

transformers has no key for how positions are stretched to another image size; its code says it: bicubic, and with
registers bicubic-antialias, which is timm's way too (the original: bilinear). Here the key `position_interpolation`
can say it; absent means what transformers does.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from bildung.core.errors import ConfigError
from bildung.model.config import ImageShape, ModelConfig
from bildung.model.config_keys import ConfigKeys, per_head
from bildung.model.names import Names, Stored

QKV = ("query", "key", "value")
INTERPOLATIONS = ("bicubic", "bilinear", "bicubic-antialias", "bilinear-antialias")


def config(keys: ConfigKeys) -> ModelConfig:
    """ViTConfig's keys."""
    architecture = keys.architecture("ViTModel", "ViTForImageClassification")
    labels, hidden_size = keys.num_labels(), keys.size("hidden_size", 768)
    keys.require("pooler_act", "tanh")
    keys.require("pooler_output_size", hidden_size)
    keys.take("encoder_stride", None)  # of the decoder for hidden patches, which is another architecture
    classify = architecture.endswith("Classification")
    return ModelConfig(
        model_type="vit",
        **shared(keys, hidden_size, image_of(keys, 224, 16)),
        intermediate_size=keys.size("intermediate_size", 3072),
        norm_eps=keys.number("layer_norm_eps", 1e-12),
        hidden_act=keys.take("hidden_act", "gelu"),
        gated=False,
        heads=("classify",) if classify else ("pooler",),
        num_labels=labels if classify else 0,
    )


def present(config: ModelConfig, tensors: Container[str]) -> dict[str, Any]:
    """What the files decide, not config.json: whether a ViTModel has its pooler."""
    return {"heads": ()} if "pooler" in config.heads and "pooler.dense.weight" not in tensors else {}


def shared(keys: ConfigKeys, hidden_size: int, image: ImageShape) -> dict[str, Any]:
    """What every ViT of transformers has."""
    keys.require("is_encoder_decoder", False)
    heads = keys.size("num_attention_heads", 12)
    rows, columns = image.grid
    return dict(
        kind="vision",
        vocab_size=0,
        hidden_size=hidden_size,
        num_hidden_layers=keys.size("num_hidden_layers", 12),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=per_head(hidden_size, heads),
        max_position_embeddings=1 + rows * columns,
        image=image,
        norm="layer",
        positions="learned",
        causal=False,
        qkv_bias=keys.flag("qkv_bias", True),
        o_bias=True,
        mlp_bias=True,
        embed_dropout=(dropout := keys.number("hidden_dropout_prob", 0.0)),
        residual_dropout=dropout,
        attention_dropout=keys.number("attention_probs_dropout_prob", 0.0),
        initializer_range=keys.number("initializer_range", 0.02),
        init="truncated",
    )


def image_of(
    keys: ConfigKeys, image_size: int, patch_size: int, interpolation: str = "bicubic", **more: Any
) -> ImageShape:
    """The image that positions are stored for. Raises ConfigError when it does not divide into patches."""
    height, width = _pair(keys, "image_size", image_size)
    patch, other = _pair(keys, "patch_size", patch_size)
    if patch != other:
        raise ConfigError(f"config.json: patch_size = [{patch}, {other}]; patches must be square.")
    if height % patch or width % patch:
        raise ConfigError(
            f"config.json: image_size = {height} x {width} does not divide into patches of patch_size = {patch}."
        )
    others = (way for way in INTERPOLATIONS if way != interpolation)
    interpolation = keys.require("position_interpolation", interpolation, *others)
    return ImageShape((height, width), patch, keys.size("num_channels", 3), interpolation, **more)


def _pair(keys: ConfigKeys, name: str, default: int) -> tuple[int, int]:
    """One number for both sides, or [height, width]."""
    given = keys.take(name, default)
    sides = given if isinstance(given, list) else [given, given]
    if len(sides) != 2 or not all(isinstance(side, int) and side is not True and 0 < side < 2**16 for side in sides):
        raise ConfigError(f"config.json: {name} = {str(given)[:80]}; a number of pixels or [height, width] is needed.")
    return sides[0], sides[1]


def ARCHITECTURE(config: ModelConfig) -> str:
    """transformers' class for these heads."""
    return "ViTForImageClassification" if "classify" in config.heads else "ViTModel"


def names(config: ModelConfig) -> Names:
    """ViT's files still have BERT's layout: attention.attention, attention.output, intermediate, output."""
    top = "vit." if "classify" in config.heads else ""
    block, own = f"{top}encoder.layer.*", "model.layers.*"
    return {
        **embedding_names(config, f"{top}embeddings"),
        f"{own}.input_layernorm": f"{block}.layernorm_before",
        **attention_names(own, block),
        f"{own}.post_attention_layernorm": f"{block}.layernorm_after",
        f"{own}.mlp.up_proj": f"{block}.intermediate.dense",
        f"{own}.mlp.down_proj": f"{block}.output.dense",
        "model.norm": f"{top}layernorm",
        "classifier.out_proj": "classifier",
    }


def embedding_names(config: ModelConfig, place: str) -> Names:
    """What stands below the blocks."""
    image = config.image
    kernel = (image.num_channels, image.patch_size, image.patch_size) if image else ()
    tokens = {f"model.{name}": f"{place}.{name}" for name in ("cls_token", "mask_token", "register_tokens")}
    projection = Stored(f"{place}.patch_embeddings.projection", shape=kernel)
    return {"model.patch_embed": projection, "model.embed_positions": f"{place}.position_embeddings", **tokens}


def attention_names(own: str, block: str) -> Names:
    """Queries, keys, values and output of a layer."""
    inner = {f"{own}.self_attn.{word[0]}_proj": f"{block}.attention.attention.{word}" for word in QKV}
    return {**inner, f"{own}.self_attn.o_proj": f"{block}.attention.output.dense"}


def MODULES(config: ModelConfig) -> dict[str, str]:
    """What transformers 5 calls the matrices in memory, which adapters go by; files keep the older names."""
    return modules(config, "vit.layers" if "classify" in config.heads else "layers", {"up": "fc1", "down": "fc2"})


def modules(config: ModelConfig, layers: str, mlp: dict[str, str]) -> dict[str, str]:
    """Module path here -> in transformers, of every layer's matrices."""
    inside = {f"self_attn.{letter}_proj": f"attention.{letter}_proj" for letter in "qkvo"}
    inside |= {f"mlp.{own}_proj": f"mlp.{theirs}" for own, theirs in mlp.items()}
    numbers = range(config.num_hidden_layers)
    return {f"model.layers.{n}.{own}": f"{layers}.{n}.{theirs}" for n in numbers for own, theirs in inside.items()}

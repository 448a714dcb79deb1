"""DINOv2: a ViT trained without labels; its states are used as they are (Oquab et al. 2023, arXiv 2304.07193).

To the ViT it adds LayerScale, a learned factor per feature on what each sublayer adds; a mask token; and in its large
form a gated feed-forward (SwiGLU). Classification reads the class token beside the mean of the patches. The published
ones are made for 518 px and used at 224, so their positions are stretched nearly always.
"""

from __future__ import annotations

from bildung.model.config import ImageShape, ModelConfig
from bildung.model.config_keys import ConfigKeys
from bildung.model.families import vit
from bildung.model.names import Names, Stored

# They shape the feature maps of Dinov2Backbone, which is another architecture; here they say nothing.
BACKBONE_KEYS = ("out_features", "out_indices", "stage_names", "reshape_hidden_states", "apply_layernorm")


def config(keys: ConfigKeys) -> ModelConfig:
    """Dinov2Config's keys."""
    return of(keys, "dinov2", "Dinov2", vit.image_of(keys, 224, 14, mask_token=keys.flag("use_mask_token", True)))


def of(keys: ConfigKeys, model_type: str, name: str, image: ImageShape) -> ModelConfig:
    """Dinov2Config, with or without registers."""
    architecture = keys.architecture(f"{name}Model", f"{name}ForImageClassification")
    classify, labels = architecture.endswith("ForImageClassification"), keys.num_labels()
    hidden_size = keys.size("hidden_size", 768)
    for key in BACKBONE_KEYS:
        keys.take(key, None)
    inner, gated = int(hidden_size * keys.number("mlp_ratio", 4)), keys.flag("use_swiglu_ffn", False)
    act = keys.take("hidden_act", "gelu")
    return ModelConfig(
        model_type=model_type,
        **vit.shared(keys, hidden_size, image),
        # A gated layer has three matrices instead of two: two thirds of the width, in steps of 8.
        intermediate_size=(int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner,
        norm_eps=keys.number("layer_norm_eps", 1e-6),
        hidden_act="silu" if gated else act,
        gated=gated,
        layer_scale=keys.number("layerscale_value", 1.0),
        drop_path=keys.number("drop_path_rate", 0.0),
        heads=("classify_mean",) if classify else (),
        num_labels=labels if classify else 0,
    )


def ARCHITECTURE(config: ModelConfig) -> str:
    """transformers' class for these heads."""
    return "Dinov2ForImageClassification" if "classify_mean" in config.heads else "Dinov2Model"


def names(config: ModelConfig) -> Names:
    """norm1, attention, layer_scale1, norm2, mlp, layer_scale2; gate and up lie in one matrix."""
    top = f"{config.model_type}." if "classify_mean" in config.heads else ""
    block, own = f"{top}encoder.layer.*", "model.layers.*"
    if config.gated:
        mlp: Names = {
            f"{own}.mlp.gate_proj": Stored(f"{block}.mlp.weights_in", part=0, parts=2),
            f"{own}.mlp.up_proj": Stored(f"{block}.mlp.weights_in", part=1, parts=2),
            f"{own}.mlp.down_proj": f"{block}.mlp.weights_out",
        }
    else:
        mlp = {f"{own}.mlp.up_proj": f"{block}.mlp.fc1", f"{own}.mlp.down_proj": f"{block}.mlp.fc2"}
    return {
        **vit.embedding_names(config, f"{top}embeddings"),
        f"{own}.input_layernorm": f"{block}.norm1",
        **vit.attention_names(own, block),
        f"{own}.attn_scale": f"{block}.layer_scale1",
        f"{own}.post_attention_layernorm": f"{block}.norm2",
        **mlp,
        f"{own}.mlp_scale": f"{block}.layer_scale2",
        "model.norm": f"{top}layernorm",
        "classifier.out_proj": "classifier",
    }


def MODULES(config: ModelConfig) -> dict[str, str]:
    """What transformers 5 calls the matrices in memory; there gate and up are two."""
    top = f"{config.model_type}." if "classify_mean" in config.heads else ""
    gated = {name: f"{name}_proj" for name in ("gate", "up", "down")}
    return vit.modules(config, f"{top}encoder.layer", gated if config.gated else {"up": "fc1", "down": "fc2"})

"""ViT, DINOv2 and DINOv2 with registers equal transformers' on random configs, and mutants of them do not.

Sizes of the model, of another image and of one that is not square; a different size for every dimension.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import bildung
from bildung.core.errors import ConfigError
from bildung.model import layers, vit
from bildung.model.block import LayerScale
from bildung.model.config import from_dict
from bildung.model.linear import match_linears
from bildung.model.low_rank import LowRank
from bildung.model.store import LanguageModel, assemble, no_tokenizer, state_tensors

SHAPE: dict[str, Any] = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    image_size=35,
    patch_size=7,
    num_channels=2,
    initializer_range=0.2,
)
# (class of transformers, config keys)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", dict(intermediate_size=80)),
    "vit-classes": ("ViTForImageClassification", dict(intermediate_size=80, num_labels=5)),
    "vit-no-bias": ("ViTModel", dict(intermediate_size=80, qkv_bias=False, hidden_act="gelu_new")),
    "vit-wide": ("ViTModel", dict(intermediate_size=80, image_size=[21, 35])),
    "dinov2": ("Dinov2Model", dict(mlp_ratio=3)),
    "dinov2-classes": ("Dinov2ForImageClassification", dict(mlp_ratio=3, num_labels=5)),
    "dinov2-swiglu": ("Dinov2Model", dict(use_swiglu_ffn=True, mlp_ratio=3, hidden_act="relu")),
    "dinov2-no-bias": ("Dinov2Model", dict(qkv_bias=False, use_mask_token=False)),
    "registers": ("Dinov2WithRegistersModel", dict(num_register_tokens=3)),
    "registers-classes": ("Dinov2WithRegistersForImageClassification", dict(num_register_tokens=3, num_labels=5)),
}
SIZES = {"its own": (35, 35), "larger": (49, 49), "smaller": (14, 14), "not square": (28, 42)}


def peer_of(name: str) -> Any:
    architecture, changes = CONFIGS[name]
    config = getattr(transformers, architecture).config_class(**{**SHAPE, **changes})
    torch.manual_seed(0)
    peer = getattr(transformers, architecture)(config).eval()
    for key, parameter in peer.named_parameters():  # ones and zeros would hide a swap
        if "norm" in key or "lambda" in key or key.endswith("bias"):
            nn.init.normal_(parameter, 1.0, 0.3)
        elif "token" in key:
            nn.init.normal_(parameter, 0.0, 0.3)
    return peer


def files_of(peer: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers writes: every key of its config, and its tensors as they lie in the file."""
    peer.save_pretrained(folder)
    raw = {**json.loads(peer.config.to_json_string(use_diff=False)), "architectures": [type(peer).__name__]}
    return raw, load_file(folder / "model.safetensors")


def peer_and_ours(name: str, folder: Path) -> tuple[Any, vit.VisionTransformer]:
    peer = peer_of(name)
    raw, tensors = files_of(peer, folder)
    return peer, assemble(from_dict(raw), tensors)


def pixels(height: int, width: int, channels: int = 2) -> Tensor:
    return torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def worst(peer: Any, ours: vit.VisionTransformer, x_BCHW: Tensor) -> float:
    """The largest difference of the states, of the vector of the image, and of the logits."""
    stretch = {"interpolate_pos_encoding": True} if "ViT" in type(peer).__name__ else {}
    if x_BCHW.shape[-2:] == ours.config.image.image_size:
        stretch = {}
    theirs = peer(pixel_values=x_BCHW, output_hidden_states=True, **stretch)
    h_BLD = ours.hidden(x_BCHW)
    if ours.classifier is not None:
        return float((theirs.logits - ours(x_BCHW)).abs().max())
    found = float((theirs.last_hidden_state - h_BLD).abs().max())
    return max(found, float((theirs.pooler_output - ours.pooled(h_BLD)).abs().max()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "vit-wide"])
def test_outputs_equal_transformers(name: str, size: str, tmp_path: Path) -> None:
    peer, ours = peer_and_ours(name, tmp_path)
    assert worst(peer, ours, pixels(*SIZES[size])) < 1e-5


def test_a_model_of_images_that_are_not_square(tmp_path: Path) -> None:
    # transformers stretches positions of square models only (it takes the root of their number), so: its own size.
    peer, ours = peer_and_ours("vit-wide", tmp_path)
    assert ours.model.image.grid == (3, 5)
    assert worst(peer, ours, pixels(21, 35)) < 1e-5
    assert ours.hidden(pixels(35, 21)).shape == (3, 16, 48)


@pytest.mark.parametrize("name", ["dinov2", "registers"])
def test_hidden_patches_equal_transformers(name: str, tmp_path: Path) -> None:
    peer, ours = peer_and_ours(name, tmp_path)
    masked_BN = torch.rand(3, 25, generator=torch.Generator().manual_seed(2)) < 0.4
    with torch.no_grad():
        theirs = peer(pixel_values=pixels(35, 35), bool_masked_pos=masked_BN).last_hidden_state
        assert (theirs - ours.hidden(pixels(35, 35), masked_BN=masked_BN)).abs().max() < 1e-5
        assert (theirs - ours.hidden(pixels(35, 35))).abs().max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_round_trip_bit_by_bit_and_open_in_transformers(name: str, tmp_path: Path) -> None:
    peer, ours = peer_and_ours(name, tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    written = state_tensors(ours)
    assert set(written) == set(stored)
    assert all(torch.equal(written[key], stored[key]) for key in stored)
    lm = LanguageModel(ours, no_tokenizer(ours.config), ours.config)
    place = bildung.save(lm, tmp_path / "ours")
    again, report = type(peer).from_pretrained(place, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    again.eval()
    assert worst(again, bildung.load(place).model, pixels(*ours.config.image.image_size)) < 1e-5


def test_a_vit_without_a_pooler(tmp_path: Path) -> None:
    _, ours = peer_and_ours("vit", tmp_path)
    raw, tensors = files_of(peer_of("vit"), tmp_path)
    assert ours.config.heads == ("pooler",)
    bare = assemble(from_dict(raw), {key: tensor for key, tensor in tensors.items() if "pooler" not in key})
    assert bare.config.heads == () and bare.pooler is None and "pooled" not in bare.sites
    x = pixels(35, 35)
    assert torch.equal(bare.hidden(x), ours.hidden(x))
    assert torch.equal(bare.pooled(bare.hidden(x)), bare.hidden(x)[:, 0])


# ── mutants ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def no_class_position(stack: vit.PatchStack, rows: int, columns: int) -> Tensor:
    positions = POSITIONS(stack, rows, columns).clone()
    positions[:, 0] = 0
    return positions


def turned_grid(stack: vit.PatchStack, rows: int, columns: int) -> Tensor:
    positions = POSITIONS(stack, rows, columns)
    grid = positions[:, 1:].unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
    return torch.cat((positions[:, :1], grid), dim=1)


def bilinear(stack: vit.PatchStack, rows: int, columns: int) -> Tensor:
    object.__setattr__(stack.image, "interpolation", "bilinear")
    return POSITIONS(stack, rows, columns)


def antialiased(stack: vit.PatchStack, rows: int, columns: int) -> Tensor:
    object.__setattr__(stack.image, "interpolation", "bicubic-antialias")
    return POSITIONS(stack, rows, columns)


def channels_last(pixels_BCHW: Tensor, image: Any) -> Tensor:
    P, C = image.patch_size, image.num_channels
    return PATCHES(pixels_BCHW, image).unflatten(-1, (C, P, P)).movedim(-3, -1).flatten(-3)


POSITIONS, PATCHES = vit.PatchStack.positions, vit.patches_of
MUTANTS: dict[str, tuple[str, str, Any, str, Callable[..., Any]]] = {
    "class token without position": ("vit", "its own", vit.PatchStack, "positions", no_class_position),
    "rows and columns swapped": ("vit", "its own", vit.PatchStack, "positions", turned_grid),
    "bilinear": ("dinov2", "larger", vit.PatchStack, "positions", bilinear),
    "antialiased": ("dinov2", "smaller", vit.PatchStack, "positions", antialiased),
    "patches flattened channels last": ("vit", "its own", vit, "patches_of", channels_last),
    "no layer scale": ("dinov2", "its own", LayerScale, "forward", lambda self, x: x),
    "another eps": (
        "vit",
        "its own",
        layers.LayerNorm,
        "forward",
        lambda self, x: nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-3),
    ),
    "registers read as patches": (
        "registers-classes",
        "its own",
        vit.VisionTransformer,
        "patch_states",
        lambda self, h: h[:, 1:],
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, size, owner, attribute, wrong = MUTANTS[mutant]
    peer, ours = peer_and_ours(name, tmp_path)
    monkeypatch.setattr(owner, attribute, wrong)
    assert worst(peer, ours, pixels(*SIZES[size])) > 1e-4


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_another_activation_fails(activation: str, tmp_path: Path) -> None:
    peer, ours = peer_and_ours("vit", tmp_path)
    for block in ours.model.layers:
        block.mlp.act = layers.activation(activation)
    assert worst(peer, ours, pixels(35, 35)) > 1e-4


# ── config keys ─────────────────────────────────────────────────────────────────────────────────────────────────────


def raw_of(name: str, **changes: Any) -> dict[str, Any]:
    architecture, own = CONFIGS[name]
    config = getattr(transformers, architecture).config_class(**{**SHAPE, **own})
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture], **changes}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("vit", dict(architectures=["ViTForMaskedImageModeling"]), "ViTForImageClassification"),
        ("dinov2", dict(architectures=["Dinov2Backbone"]), "Dinov2Model"),
        ("vit", dict(patch_size=[7, 5]), "square"),
        ("vit", dict(image_size=36), "does not divide into patches of patch_size = 7"),
        ("vit", dict(image_size=[35, 35, 3]), "image_size"),
        ("vit", dict(image_size="35"), "image_size"),
        ("vit", dict(num_attention_heads=7), "48 does not divide into 7"),
        ("vit", dict(pooler_act="relu"), "pooler_act"),
        ("vit", dict(pooler_output_size=20), "pooler_output_size"),
        ("vit", dict(position_interpolation="nearest"), "bicubic"),
        ("vit", dict(num_registers=4), "num_registers"),
        ("vit", dict(hidden_act="mish"), "mish"),
        ("vit-classes", dict(id2label={"0": "a", "2": "b"}), "id2label"),
        ("vit-classes", dict(id2label={"0": "a"}, num_labels=3), "3 classes"),
        ("dinov2", dict(drop_path_rate=1.0), "drop_path"),
        ("dinov2", dict(mlp_ratio="4"), "mlp_ratio"),
        ("registers", dict(num_register_tokens=-1), "num_register_tokens"),
    ],
)
def test_keys_that_cannot_be_honoured_are_refused(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        layers.activation(from_dict(raw_of(name, **changes)).hidden_act)


def test_keys_are_honoured() -> None:
    config = from_dict(
        raw_of(
            "dinov2-classes",
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.2,
            drop_path_rate=0.3,
            layerscale_value=1e-4,
            position_interpolation="bicubic-antialias",
        )
    )
    assert (config.embed_dropout, config.residual_dropout, config.attention_dropout) == (0.1, 0.1, 0.2)
    assert (config.drop_path, config.layer_scale, config.num_labels) == (0.3, 1e-4, 5)
    assert config.image.interpolation == "bicubic-antialias"


# ── adapters ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["vit", "vit-classes", "dinov2-classes", "dinov2-swiglu", "registers-classes"])
def test_adapters_go_both_ways_with_peft(name: str, tmp_path: Path) -> None:
    _, ours = peer_and_ours(name, tmp_path / "theirs")
    base = bildung.save(LanguageModel(ours, no_tokenizer(ours.config), ours.config), tmp_path / "base")
    lm = bildung.load(base)
    for linear in match_linears(lm.model, ("model.layers.*", "model.patch_embed")).values():
        linear.deltas["lora"] = LowRank(linear.in_features, linear.out_features, 2, 1.5)
        nn.init.normal_(linear.deltas["lora"].lora_B, std=0.2)
    adapter = bildung.save(lm, tmp_path / "adapter")
    architecture = getattr(transformers, CONFIGS[name][0])
    theirs = peft.PeftModel.from_pretrained(architecture.from_pretrained(base), adapter).eval()
    x = pixels(35, 35)
    assert worst(theirs, lm.model, x) < 1e-5 < 1e-3 < worst(theirs, ours, x)
    assert worst(theirs, bildung.load(adapter).model, x) < 1e-5
    made = peft.get_peft_model(architecture.from_pretrained(base), peft.LoraConfig(r=3, target_modules=TARGETS)).eval()
    for key, parameter in made.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path / "made")
    assert worst(made, bildung.load(tmp_path / "made").model, x) < 1e-5


TARGETS = r".*(q_proj|v_proj|fc1|gate_proj|projection)"

"""The patch projection is a convolution, positions stretch, sites read and write, and what does not fit says so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bildung
from bildung.core.errors import DataError, ModelFileError, NoSuchSite
from bildung.model.attention import Mask
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import match_linears, replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import METHODS
from bildung.model.store import LanguageModel, no_tokenizer
from bildung.model.taps import match_sites
from bildung.model.vit import patches_of

KEYS: dict[str, Any] = {
    "model_type": "vit",
    "image_size": [12, 20],
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "initializer_range": 0.2,
    "architectures": ["ViTForImageClassification"],
    "id2label": {"0": "a", "1": "b", "2": "c", "3": "d"},
}


NO_MASK = Mask(None, causal=False)


def tiny(**changes: Any) -> Any:
    keys = {key: value for key, value in {**KEYS, **changes}.items() if value is not None}
    return build(from_dict(keys), seed=2).eval()


def pixels(height: int = 12, width: int = 20, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_the_patch_projection_is_a_convolution() -> None:
    model, x = tiny(), pixels()
    linear = model.model.patch_embed
    kernel_DCPP = linear.base.weight.view(24, 3, 4, 4)
    convolved = F.conv2d(x, kernel_DCPP, linear.bias, stride=4).flatten(2).transpose(1, 2)
    assert torch.allclose(linear(patches_of(x, model.config.image)), convolved, atol=1e-5)


def test_channels_last_is_the_same_after_permuting_the_weight() -> None:
    # Others flatten a patch as (P, P, C); a checkpoint of theirs fits after one permutation of the columns.
    model, x = tiny(), pixels()
    linear = model.model.patch_embed
    patches = patches_of(x, model.config.image)
    theirs = patches.unflatten(-1, (3, 4, 4)).movedim(-3, -1).flatten(-3)
    assert not torch.allclose(F.linear(theirs, linear.base.weight, linear.bias), linear(patches), atol=1e-2)
    permuted = linear.base.weight.view(24, 3, 4, 4).permute(0, 2, 3, 1).flatten(1)
    assert torch.allclose(F.linear(theirs, permuted, linear.bias), linear(patches), atol=1e-5)


def test_patches_come_in_reading_order() -> None:
    model = tiny(num_channels=1)
    x = torch.arange(12 * 20.0).view(1, 1, 12, 20)
    patches = patches_of(x, model.config.image)
    assert patches[0, 1].tolist() == x[0, 0, 0:4, 4:8].flatten().tolist()
    assert patches[0, 5].tolist() == x[0, 0, 4:8, 0:4].flatten().tolist()


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "bicubic-antialias", "bilinear-antialias"])
def test_positions_stretch_by_the_recorded_mode(mode: str) -> None:
    model = tiny(position_interpolation=mode)
    stack = model.model
    assert torch.equal(stack.positions(3, 5), stack.embed_positions)  # its own size: not touched
    grid = stack.embed_positions[:, 1:].view(1, 3, 5, 24).permute(0, 3, 1, 2)
    name, _, antialias = mode.partition("-")
    expected = F.interpolate(grid, size=(2, 7), mode=name, antialias=bool(antialias), align_corners=False)
    found = stack.positions(2, 7)
    assert torch.equal(found[:, 0], stack.embed_positions[:, 0])
    assert torch.allclose(found[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 14, 24), atol=1e-6)
    assert model.hidden(pixels(8, 28)).shape == (2, 15, 24)


def test_a_constant_grid_stays_constant_and_half_precision_is_stretched_in_float32() -> None:
    stack = tiny().model
    stack.embed_positions.data[:, 1:] = 0.7
    assert torch.allclose(stack.positions(9, 4)[:, 1:], torch.tensor(0.7), atol=1e-5)
    model = tiny()
    fine = model.model.positions(6, 7)
    rough = copy.deepcopy(model).to(torch.bfloat16).model.positions(6, 7)
    assert rough.dtype == torch.bfloat16 and (rough.float() - fine).abs().max() < 0.02


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (pixels(12, 18), "12 x 18 pixels does not divide into patches of 4 x 4; .* 12 x 16"),
        (pixels(2, 4), "2 x 4 pixels does not divide"),
        (pixels(12, 20, 1), r"\(batch, 3, height, width\) is needed"),
        (pixels()[0], r"\(3, 12, 20\) were given"),
        (torch.zeros(1, 3, 0, 4), "0 x 4 pixels"),
    ],
)
def test_pixels_that_do_not_fit(x: torch.Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        tiny()(x)


def test_heads_that_are_not_there() -> None:
    bare = tiny(architectures=["ViTModel"])
    with pytest.raises(ModelFileError, match="no classification head"):
        bare(pixels())
    with pytest.raises(ModelFileError, match="no mask token"):
        bare.hidden(pixels(), masked_BN=torch.zeros(2, 15, dtype=torch.bool))
    masked = build(from_dict({"model_type": "dinov2", "image_size": 28, "num_hidden_layers": 1, "hidden_size": 24}))
    with pytest.raises(DataError, match=r"truth values of shape \(2, 4\)"):
        masked.hidden(pixels(28, 28), masked_BN=torch.zeros(2, 5, dtype=torch.bool))


def test_every_site_is_read_and_the_kernel_agrees_with_the_explicit_path() -> None:
    model, x = tiny(), pixels()
    plain = model(x)
    with bildung.observe(model, "*") as seen:
        assert torch.allclose(model(x), plain, atol=1e-5)
    sizes = dict(B=2, L=16, S=16, P=15, D=24, N=3, K=3, H=8, F=40, C=4)
    assert set(seen) == set(bildung.sites(model))
    for site, shape in bildung.sites(model).items():
        assert seen[site].shape == tuple(sizes[letter] for letter in shape.split()), site
    assert torch.allclose(seen["layers.1.attn.probs"].sum(-1), torch.ones(2, 3, 16), atol=1e-5)
    with pytest.raises(NoSuchSite, match=r"layers 0\.\.1"):
        match_sites(model, "layers.2.*")


def test_interventions_change_what_is_above() -> None:
    model, x = tiny(), pixels()
    plain = model(x)
    with bildung.intervene(model, {"layers.0.mlp.out": lambda y: y * 1}):
        assert torch.equal(model(x), plain)

    def only_itself(probs: torch.Tensor) -> torch.Tensor:  # the class token sees no patch
        alone = probs.clone()
        alone[:, :, 0] = 0
        alone[:, :, 0, 0] = 1
        return alone

    with bildung.intervene(model, {"layers.*.attn.probs": only_itself}):
        blind = model(x)
        assert torch.allclose(blind, model(x * 3 + 1), atol=1e-5)  # whatever the image
    assert not torch.allclose(blind, plain, atol=1e-3)


def test_lora_on_a_vit_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny()
    base = bildung.save(LanguageModel(model, no_tokenizer(model.config), model.config), tmp_path / "base")
    lm = bildung.load(base)
    for linear in match_linears(lm.model, "*.q_proj").values():
        linear.deltas["lora"] = LowRank(linear.in_features, linear.out_features, 2, 2.0)
        torch.nn.init.normal_(linear.deltas["lora"].lora_B)
    again = bildung.load(bildung.save(lm, tmp_path / "lora"))
    assert not torch.allclose(lm.model(pixels()), model(pixels()), atol=1e-3)
    assert torch.allclose(again.model(pixels()), lm.model(pixels()), atol=1e-5)


@pytest.mark.parametrize(("method", "error"), [("int8", 0.02), ("nf4", 0.5)])
def test_quantized_stores_are_saved_and_loaded(method: str, error: float, tmp_path: Path) -> None:
    model = tiny(hidden_size=64, num_attention_heads=4, intermediate_size=128)
    plain = model(pixels())
    replace_stores(model, "model.*", lambda linear: METHODS[method].quantize(linear.base.dense().detach()))
    place = bildung.save(LanguageModel(model, no_tokenizer(model.config), model.config), tmp_path / "quantized")
    found = bildung.load(place).model(pixels())
    assert torch.allclose(found, model(pixels()), atol=1e-5)
    assert 0 < float(((found - plain).norm() / plain.norm()).detach()) < error


def test_it_has_no_tokenizer_and_says_so(tmp_path: Path) -> None:
    model = tiny()
    lm = bildung.load(bildung.save(LanguageModel(model, no_tokenizer(model.config), model.config), tmp_path / "vit"))
    assert sorted(path.name for path in (tmp_path / "vit").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ModelFileError, match="a vit reads images; it has no tokenizer"):
        lm.tokenizer.encode("text")
    assert copy.deepcopy(lm).tokenizer is not None and "NoTokenizer" in repr(lm.tokenizer)


def test_drop_path_leaves_out_sublayers_of_some_images_in_training_only() -> None:
    changes = dict(model_type="dinov2", architectures=["Dinov2Model"], intermediate_size=None, drop_path_rate=0.5)
    model = tiny(**changes)
    x = pixels()[:1].expand(400, -1, -1, -1)
    still = tiny(**{**changes, "drop_path_rate": 0.0})
    assert torch.equal(model.hidden(x[:2]), still.hidden(x[:2]))
    model.train()
    torch.manual_seed(0)
    with torch.no_grad(), bildung.observe(model, ["layers.0.resid_pre", "layers.0.resid_mid"]) as seen:
        model.hidden(x)
    added_BLD = seen["layers.0.resid_mid"] - seen["layers.0.resid_pre"]
    skipped_B = (added_BLD == 0).flatten(1).all(1)
    assert 0.4 < float(skipped_B.float().mean()) < 0.6
    block, entered = still.model.layers[0], seen["layers.0.resid_pre"][:1]
    whole = block.attn_scale(block.self_attn(block.input_layernorm(entered), None, NO_MASK, None))
    kept = added_BLD[~skipped_B][0]
    assert torch.allclose(kept, 2 * whole[0], atol=1e-5)  # divided by the share that is kept


def test_it_starts_as_stated() -> None:
    model = tiny(model_type="dinov2", architectures=["Dinov2Model"], intermediate_size=None, layerscale_value=1e-3)
    assert float(model.model.layers[1].mlp_scale.lambda1.detach().max()) == pytest.approx(1e-3)
    assert not model.model.mask_token.any()
    positions = model.model.embed_positions.detach()
    assert 0.1 < float(positions.std()) < 0.2 and float(positions.abs().max()) <= 0.4  # cut off at two deviations


def test_it_compiles_and_runs_in_bfloat16() -> None:
    model, x = tiny(), pixels()
    plain = model(x)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(x), plain, atol=1e-5)
    model.compute_dtype = torch.bfloat16
    assert (model(x).float() - plain).abs().max() < 0.1

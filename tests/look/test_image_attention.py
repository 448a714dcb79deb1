"""Where the class token looks: equal to transformers' attentions, laid out on the image's patches, drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import bildung
from bildung.core.errors import DataError
from bildung.data.image_processor import ImageProcessor, read_processor
from bildung.look.image_attention import Settings, image_attention, look_at
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel, no_tokenizer

KEYS: dict[str, Any] = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "id2label": {"0": "cat", "1": "owl"},
    "image_size": [12, 20],
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "initializer_range": 0.3,
}


def saved(folder: Path, processor: ImageProcessor | None = None, **changes: Any) -> Path:
    config = from_dict({**KEYS, **changes})
    place = bildung.save(LanguageModel(build(config, seed=4), no_tokenizer(config), config), folder / "model")
    (processor or ImageProcessor(mean=(0.5,), std=(0.5,), size=(12, 20))).write(place)
    return place


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def test_it_is_the_attention_of_transformers_on_the_patches(model: Path, picture: Path) -> None:
    found = look_at(bildung.load(model), read_processor(model), picture, None)
    peer = transformers.ViTForImageClassification.from_pretrained(model, attn_implementation="eager").eval()
    with torch.no_grad():
        said = peer(read_processor(model)(Image.open(picture))[None], output_attentions=True)
    theirs = torch.stack([layer[0, :, 0] for layer in said.attentions])
    assert torch.allclose(found.probs_NHRC.flatten(2), theirs[..., 1:], atol=1e-5)
    assert torch.allclose(found.own_NH, theirs[..., 0], atol=1e-5)
    assert found.probs_NHRC.shape == (2, 3, 3, 5)
    assert found.predicted.split()[0] == peer.config.id2label[int(said.logits.argmax())]


def test_the_directory_it_leaves(model: Path, picture: Path, tmp_path: Path) -> None:
    record = image_attention(model, tmp_path / "out", Settings(image=picture))
    numbers = json.loads((tmp_path / "out" / "image_attention.json").read_text())
    assert numbers["grid"] == [3, 5] and len(numbers["entropy"]) == 2 and record.measured["grid"] == [3, 5]
    probs = load_file(tmp_path / "out" / "patterns.safetensors")["probs"]
    p = probs[1, 2].flatten() / probs[1, 2].sum()
    assert numbers["entropy"][1][2] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-3)
    drawn = Image.open(tmp_path / "out" / "image_attention.png")
    assert drawn.width > 500 and len(drawn.convert("RGB").getcolors(10**6)) > 100
    before = record.fingerprint
    Image.new("L", (40, 30)).save(picture)  # another image under the same name is another look
    with pytest.raises(bildung.core.errors.OutputError):
        image_attention(model, tmp_path / "out", Settings(image=picture))
    assert image_attention(model, tmp_path / "out", Settings(image=picture), force=True).fingerprint != before


def test_a_larger_size_gives_finer_maps_and_registers_are_left_out(picture: Path, tmp_path: Path) -> None:
    three = ImageProcessor(mean=(0.5,) * 3, std=(0.5,) * 3, size=(12, 12), convert_rgb=True)
    changes = dict(model_type="dinov2_with_registers", num_register_tokens=2, num_channels=3, image_size=12)
    raw = {key: value for key, value in {**KEYS, **changes}.items() if key != "intermediate_size"}
    config = from_dict({**raw, "architectures": ["Dinov2WithRegistersModel"]})
    lm = LanguageModel(build(config, seed=1), no_tokenizer(config), config)
    found = look_at(lm, three, picture, 24)
    assert found.probs_NHRC.shape == (2, 3, 6, 6) and found.predicted is None
    assert float((found.probs_NHRC.flatten(2).sum(-1) + found.own_NH).max()) < 1  # what is missing goes to registers


def test_what_cannot_be_looked_at(model: Path, tiny_lm_directory: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:100])
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    for image, said in (("broken.png", "damaged image"), ("colour.png", "3 channels"), ("none.png", "is not a file")):
        with pytest.raises(DataError, match=said):
            image_attention(model, tmp_path / "out", Settings(image=tmp_path / image))
    with pytest.raises(DataError, match="21 x 21 pixels does not divide"):
        image_attention(model, tmp_path / "out", Settings(image=picture, size=21))
    with pytest.raises(DataError, match="does not read images"):
        image_attention(tiny_lm_directory, tmp_path / "out", Settings(image=picture))
    assert not (tmp_path / "out").exists()

"""A vision model from nothing on small pictures of bars, going on, new heads, other sizes; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import bildung
from bildung.core.errors import ConfigError, DataError, ModelFileError, SettingsError
from bildung.core.recipe import read_recipe
from bildung.data import nursery
from bildung.data.image_processor import ImageProcessor, read_processor
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel, no_tokenizer
from bildung.pretrain.image import Settings, image

VIT = dict(
    model_type="vit",
    image_size=12,
    patch_size=4,
    num_channels=1,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    initializer_range=0.2,
)
DECODER = dict(model_type="gpt2", n_embd=16, n_head=2, n_layer=1)
CLASSES = ("across", "down")


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a subfolder per class: a bright bar across or down, in some noise."""
    folder = tmp_path_factory.mktemp("bars")
    draw = np.random.default_rng(0)
    for number in range(120):
        values = draw.integers(0, 120, (12, 12), dtype=np.uint8)
        at = int(draw.integers(0, 12))
        values[(at, slice(None)) if number % 2 == 0 else (slice(None), at)] = 255
        path = folder / CLASSES[number % 2] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(path)
    return folder


def settings(bars: Path, **changes: Any) -> Settings:
    given = dict(data=str(bars), model=VIT, held_out=40, steps=120, batch_size=32, learning_rate=1e-2, precision="fp32")
    return Settings(**{key: value for key, value in {**given, **changes}.items() if value is not None})


@pytest.fixture(scope="module")
def trained(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vit") / "out"
    image(None, out, settings(bars, sizes=(16, 8), evaluate_every=60, shift=1))
    return out


def test_a_vit_learns_from_nothing_and_is_measured_beside_its_baselines(trained: Path) -> None:
    record = json.loads((trained / "record.json").read_text())
    measured = record["measured"]
    assert measured["accuracy"] > 0.9 and measured["nearest_neighbour"] > 0.7
    assert measured["majority_class"] < 0.6
    assert measured["accuracy_at_16_px"] > 0.6 and "accuracy_at_8_px" in measured
    tasks = record["after"]["tasks"]
    assert tasks["images"]["n"] == 40 and tasks["images at 16 px"]["value"] == measured["accuracy_at_16_px"]
    assert record["source"] is None and record["data"]
    log = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert "accuracy" in log[5] and "held_out_accuracy" in log[0]


def test_what_it_leaves_opens_in_transformers(trained: Path, bars: Path) -> None:
    lm, processor = bildung.load(trained), read_processor(trained)
    assert lm.config.raw["id2label"] == {"0": "across", "1": "down"}
    peer = transformers.ViTForImageClassification.from_pretrained(trained).eval()
    theirs = ViTImageProcessorPil.from_pretrained(trained)
    picture = Image.open(next(bars.glob("down/*.png")))
    with torch.no_grad():
        x = theirs(picture, return_tensors="pt")["pixel_values"]
        assert (x[0] - processor(picture)).abs().max() < 1e-6
        assert (peer(x).logits - lm.model(processor(picture)[None])).abs().max() < 1e-5
        assert peer.config.id2label[int(peer(x).logits.argmax())] == "down"


def test_the_word_nothing_is_no_source(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert image("nothing", tmp_path / "out", settings(bars, steps=1)).source is None
    (tmp_path / "nothing").mkdir()  # unless something is called so
    with pytest.raises(ModelFileError, match=r"config\.json"):
        image("nothing", tmp_path / "other", settings(bars, model=None, steps=1))


def test_a_killed_run_goes_on_from_its_checkpoint(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(bars, steps=12, shift=1, checkpoint_every=4)
    image(None, tmp_path / "whole", given)
    from bildung.train.classify import Classify

    calls, plain = [], Classify.__call__

    def dies(self: Any, model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return plain(self, model, batch)

    monkeypatch.setattr(Classify, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        image(None, tmp_path / "killed", given)
    image(None, tmp_path / "killed", given)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert a == b and len(calls) < 2 * 12  # the first four steps were not done again


def test_going_on_measures_before_and_after(trained: Path, bars: Path, tmp_path: Path) -> None:
    record = image(trained, tmp_path / "more", settings(bars, model=None, steps=10, learning_rate=1e-3))
    assert (
        record.before["tasks"]["images"]["value"] == record.source_after() if hasattr(record, "source_after") else True
    )
    assert "change" in record.after["tasks"]["images"]
    assert record.before["tasks"]["images"]["n"] == 40
    assert read_processor(tmp_path / "more") == read_processor(trained)


def test_a_model_without_a_head_gets_one(bars: Path, tmp_path: Path) -> None:
    raw = {**VIT, "model_type": "dinov2", "mlp_ratio": 2, "num_channels": 3, "image_size": 20}
    del raw["intermediate_size"]
    config = from_dict(raw)
    model = build(config, seed=1).eval()
    source = bildung.save(LanguageModel(model, no_tokenizer(config), config), tmp_path / "dino")
    with pytest.raises(ModelFileError, match=r"preprocessor_config\.json"):
        image(source, tmp_path / "out", settings(bars, model=None))
    ImageProcessor(mean=(0.5,) * 3, std=(0.5,) * 3, size=(12, 12), convert_rgb=True).write(source)
    record = image(source, tmp_path / "out", settings(bars, model=None, steps=1, learning_rate=1e-9))
    assert not record.before.get("tasks")  # it could not classify
    lm = bildung.load(tmp_path / "out")
    assert lm.config.heads == ("classify_mean",) and lm.config.num_labels == 2
    x = torch.randn(2, 3, 12, 12)
    assert torch.allclose(lm.model.hidden(x), model.hidden(x), atol=1e-4)  # the body came along
    assert transformers.Dinov2ForImageClassification.from_pretrained(tmp_path / "out").config.num_labels == 2


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (dict(model=None), SettingsError, "needs `model`"),
        (dict(model={**VIT, "image_size": 13}), ConfigError, "does not divide into patches"),
        (dict(model={**VIT, "num_channels": 2}), DataError, "1 .grey. or 3"),
        (dict(model={**VIT, "model_type": "vitt"}), ConfigError, "did you mean"),
        (dict(model={**DECODER}), DataError, "kind 'decoder'"),
        (dict(sizes=(18,)), DataError, "18 px do not divide into patches of 4 px; take 16"),
        (dict(sizes=(16,), held_out=0), SettingsError, "need images to measure on"),
        (dict(evaluate_every=5, held_out=0), SettingsError, "needs held_out images"),
        (dict(shift=-1), SettingsError, "shift = -1"),
        (dict(label_smoothing=1.0), SettingsError, "label_smoothing"),
        (dict(held_out=120), DataError, "held_out = 120 of 120"),
        (dict(data="no/such/folder"), DataError, "no/such/folder"),
        (dict(image="picture"), DataError, "without 'picture'"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    changes: dict[str, Any], error: type[Exception], said: str, bars: Path, tmp_path: Path
) -> None:
    given = settings(bars, **{"steps": 2, **changes})
    if changes.get("model", 1) is None:
        given = Settings(data=str(bars), steps=2)
    with pytest.raises(error, match=said):
        image(None, tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_sources_that_do_not_fit(trained: Path, tiny_lm_directory: Path, bars: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not read images"):
        image(tiny_lm_directory, tmp_path / "out", settings(bars, model=None))
    with pytest.raises(SettingsError, match="holds a model; `model` is for a new one"):
        image(trained, tmp_path / "out", settings(bars))
    with pytest.raises(SettingsError, match="holds no model to go on from; for a new one, give 'nothing'"):
        image(bars, tmp_path / "out", settings(bars))
    (tmp_path / "owls" / "owl").mkdir(parents=True)
    Image.new("L", (12, 12)).save(tmp_path / "owls" / "owl" / "1.png")
    with pytest.raises(DataError, match=r"label 'owl' is none of the 2 classes .across, down."):
        image(trained, tmp_path / "out", settings(tmp_path / "owls", model=None, held_out=0))


RECIPE = Path(__file__).parents[2] / "recipes" / "vit_mnist.yaml"


@pytest.mark.real
def test_the_recipe_in_short(tmp_path: Path) -> None:
    if not nursery.is_current("mnist"):
        pytest.skip("mnist is not in the nursery")
    born = next(step for step in read_recipe(RECIPE).steps if step.verb.name == "pretrain image")
    given = {**born.given, "steps": 250, "limit": 4000, "sizes": (35,)}
    record = image(None, tmp_path / "vit", Settings(**given))
    assert record.measured["majority_class"] < 0.2 < 0.6 < record.measured["accuracy"]
    assert record.measured["accuracy_at_35_px"] > 0.4

"""Image classification: a vision model from nothing, or one that goes on learning, on labelled images.

    bildung pretrain image nothing OUT --data nursery:mnist/train --test nursery:mnist/test --model vit.yaml
    bildung pretrain image MODEL OUT --data photos/

A new model gets its classes from the data and its preprocessing from its image size. A model without a classification
head (a DINOv2, for instance) gets a new one. Beside its accuracy stand two baselines that learn nothing: the most
frequent class, and the nearest training image by pixels. `sizes` measures it on larger or smaller images as well, its
positions stretched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bildung.core import ranks
from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.image_processor import ImageProcessor, read_processor
from bildung.data.images import Images, ShuffledImages, fingerprint, read_images
from bildung.evaluate import image_card
from bildung.evaluate.compare import compare_cards
from bildung.model.build import build
from bildung.model.config import ModelConfig, from_dict
from bildung.model.store import LanguageModel, load, no_tokenizer, write_model
from bildung.pretrain.birth import Keys, set_aside
from bildung.train.classify import Classify, image_logits
from bildung.train.training import COMPUTE, Training, check_ranges, check_trainable, run

NOTHING = "nothing"  # what to give as SOURCE on the command line for a birth
HEADED = {"vit": "ViTForImageClassification", "dinov2": "Dinov2ForImageClassification"}
HEADED["dinov2_with_registers"] = "Dinov2WithRegistersForImageClassification"


@settings_class
class Settings(Training):
    """Image classification."""

    data: str  # images to learn: rows with image and label, or a folder with a subfolder per class
    test: str | None = None  # images to measure on; default: those of `held_out`
    held_out: int = 0  # images kept out of training, to measure on where there is no `test`
    limit: int | None = None  # use only the first so many images
    image: str = "image"  # column of the image
    label: str = "label"  # column of its class, a number or a name
    # of a new model: the keys of its config.json as a mapping, as "{model_type: vit, ...}", or as a .json/.yaml file
    model: Keys | None = None
    shift: int = 0  # move every image by up to so many pixels, another way each time
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    sizes: tuple[int, ...] = ()  # other image sizes, in pixels, to measure at the end
    learning_rate: float = 1e-3  # at the top of the schedule
    weight_decay: float = 0.05  # of matrices; vectors are never decayed
    batch_size: int = 64  # images per micro-step
    checkpoint_every: int = 100  # steps between checkpoints; a killed run goes on from the last


def image(source: Path | str | None, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train an image classifier; `out` becomes a model directory with its preprocessor_config.json.

    source: a model directory, or nothing. Raises SettingsError, ConfigError, DataError and TrainingError, each saying
    what does not fit.
    """
    path = None if source is None or (str(source) == NOTHING and not Path(source).exists()) else Path(source)
    check(settings)

    def work(job: Job) -> None:
        lm = None if path is None else loaded(path, settings)
        config = planned(settings) if lm is None else lm.config
        image_card.check_sizes(config, settings.sizes)
        processor = processor_for(config) if path is None else read_processor(path)
        known = class_names(config) if lm is not None and lm.model.classifier is not None else None
        images = read(settings, settings.data, processor, known)
        train, aside = split(images, settings)
        final = aside if settings.test is None else read(settings, settings.test, processor, images.classes)
        if lm is None:
            lm = born(settings, images.classes)
        elif known is None:
            lm = with_head(lm, images.classes, settings.seed)
        if final is not None and known is not None:
            job.before = image_card.image_card(lm.model, {"images": (final, processor)})
        lm.model.requires_grad_(True)
        lm.model.compute_dtype = COMPUTE[settings.precision]
        run(
            job,
            lm.model,
            settings,
            ShuffledImages(train, processor, settings.batch_size, settings.seed, settings.shift),
            Classify(image_logits, settings.label_smoothing),
            what=f"{len(train):,} images of {len(images.classes)} classes",
            held_out=list(aside.batches(processor)) if aside is not None else (),
            notes=[*images.notes, *(final.notes if final is not None and settings.test is not None else ())],
        )
        lm.model.compute_dtype = None
        if final is not None:
            measure(job, settings, lm.model, processor, train, final)
        write_model(lm, job.out)
        processor.write(job.out)

    data = fingerprint(settings.data) | (fingerprint(settings.test) if settings.test is not None else {})
    return perform("pretrain image", path, out, settings, work, data=data, force=force)


def check(settings: Settings) -> None:
    """Raises SettingsError for what can be seen to be wrong without reading anything."""
    check_ranges(settings)
    if settings.shift < 0 or not 0 <= settings.label_smoothing < 1:
        raise SettingsError(
            f"shift = {settings.shift} and label_smoothing = {settings.label_smoothing} were given; a shift is at "
            f"least 0, and label smoothing lies in [0, 1)."
        )
    if settings.evaluate_every and not settings.held_out:
        raise SettingsError(
            f"evaluate_every = {settings.evaluate_every} needs held_out images to measure on; those of `test` are for "
            f"the end, or they would choose the model that they judge."
        )
    if settings.sizes and settings.test is None and not settings.held_out:
        raise SettingsError(f"sizes = {settings.sizes} need images to measure on: give `test` or `held_out`.")


def read(settings: Settings, source: str, processor: ImageProcessor, classes: tuple[str, ...] | None) -> Images:
    """The images of a source at the model's size."""
    columns = {"image": settings.image, "label": settings.label}
    return read_images(source, processor, limit=settings.limit, classes=classes, **columns)


def planned(settings: Settings) -> ModelConfig:
    """The config of a model to be born, its classes not known yet. Raises SettingsError when there is none."""
    if settings.model is None:
        raise SettingsError(
            "a new model needs `model`: the keys of a config.json, such as model_type: vit, image_size, patch_size, "
            "hidden_size, num_hidden_layers. (Or give a model directory to go on from.)"
        )
    keys: dict[str, Any] = json.loads(settings.model)
    config = from_dict(keys)
    if config.kind != "vision":
        raise DataError(f"a {config.model_type} is of kind {config.kind!r}; images are for {', '.join(HEADED)}.")
    return config


def processor_for(config: ModelConfig) -> ImageProcessor:
    """Preprocessing of a new model: resized to its size, and each channel from -1 to 1."""
    assert config.image is not None
    channels = config.image.num_channels
    if channels not in (1, 3):
        raise DataError(f"num_channels = {channels}; images have 1 (grey) or 3 (RGB).")
    half = (0.5,) * channels
    return ImageProcessor(mean=half, std=half, size=config.image.image_size, convert_rgb=channels == 3)


def loaded(path: Path, settings: Settings) -> LanguageModel:
    """The source's model in float32. Raises SettingsError, DataError and TrainingError when it cannot be trained so."""
    if settings.model is not None:
        there = path.is_file() or (path / "config.json").exists()
        raise SettingsError(
            f"{path} holds a model; `model` is for a new one, from {NOTHING!r}. Leave it out."
            if there
            else f"{path} holds no model to go on from; for a new one, give {NOTHING!r} in its place."
        )
    lm = load(path, "float32")
    if lm.config.kind != "vision":
        raise DataError(f"{path} is a {lm.config.model_type}, which does not read images.")
    check_trainable(lm, path)
    return lm


def class_names(config: ModelConfig) -> tuple[str, ...]:
    """The names of a classifier's classes, in order."""
    names = config.raw.get("id2label") or {}
    return tuple(str(names.get(str(number), number)) for number in range(config.num_labels))


def born(settings: Settings, classes: Sequence[str]) -> LanguageModel:
    """A model with random weights that tells these classes apart."""
    keys = json.loads(settings.model or "{}")
    config = from_dict({**keys, **headed(keys["model_type"], classes)})
    return LanguageModel(build(config, settings.seed).to(ranks.device()), no_tokenizer(config), config)


def with_head(lm: LanguageModel, classes: Sequence[str], seed: int) -> LanguageModel:
    """The same model with a new head for these classes (and without a pooler, which that head does not read)."""
    config = from_dict({**lm.config.raw, **headed(lm.config.model_type, classes)})
    model = build(config, seed).to(lm.model.device)
    model.model.load_state_dict(lm.model.model.state_dict())
    return replace(lm, model=model, config=config)


def headed(model_type: str, classes: Sequence[str]) -> dict[str, Any]:
    """The keys of config.json that say: with a head, for these classes."""
    return {
        "architectures": [HEADED[model_type]],
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def split(images: Images, settings: Settings) -> tuple[Images, Images | None]:
    """(images to train on, those held out)."""
    if not settings.held_out:
        return images, None
    kept, aside = set_aside(range(len(images)), settings.held_out, settings.seed)
    return images.take(kept), images.take(aside)


def measure(job: Job, settings: Settings, model: Any, processor: ImageProcessor, train: Images, final: Images) -> None:
    """Accuracy at the model's size and at others, beside the baselines, into the record and onto the screen."""
    views = {"images": (final, processor)}
    for side in settings.sizes:
        other = processor.resized(side, side)
        source = settings.data if settings.test is None else settings.test
        again = read(settings, source, other, final.classes)
        views[f"images at {side} px"] = (again if settings.test else split(again, settings)[1] or again, other)
    job.after = image_card.image_card(model, views)
    for one in compare_cards(job.before, job.after):
        job.after["tasks"][one.task]["change"] = {"difference": one.difference, "stderr": one.stderr}
    found = {name: task["value"] for name, task in job.after["tasks"].items()}
    figures = {
        "majority_class": image_card.majority(train, final),
        "nearest_neighbour": image_card.nearest_neighbour(train, final),
        "accuracy": found["images"],
        **{f"accuracy_at_{side}_px": found[f"images at {side} px"] for side in settings.sizes},
    }
    job.measured |= figures
    print(f"of {len(final):,} images: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))

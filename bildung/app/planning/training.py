"""The plan of an operation that trains: its model on paper, and a batch of the shape that its settings ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.core.verbs import find, verbs
from bildung.data.batches import Batch
from bildung.data.images import ImageBatch
from bildung.data.labelled import TextBatch
from bildung.data.masking import MaskedBatch
from bildung.data.seq2seq import Seq2SeqBatch
from bildung.model.adapter_head import headed
from bildung.model.config import from_dict, read_config
from bildung.model.count import on_paper
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.shifted_attention import shifted
from bildung.model.store import LanguageModel, load
from bildung.pretrain import masked
from bildung.pretrain.birth import config_for
from bildung.pretrain.size import Sized, chosen
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.classify import Classify, image_logits
from bildung.train.loss import LossSum, Objective
from bildung.train.masked import mlm, mlm_nsp
from bildung.train.objectives import clm, token_logprobs
from bildung.train.plan import DRIFTS_AFTER, KERNELS, Moments, Plan, plan
from bildung.train.precision import COMPUTE, FROZEN
from bildung.train.predict import copies, largest
from bildung.train.seq2seq import seq2seq
from bildung.train.training import check_trainable, steps_of
from bildung.tune import classify, classify_words, long_lora
from bildung.tune.classifier_head import PROBLEM_TYPE
from bildung.tune.classifier_methods import choose_trained


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned: a model on paper, as the operation would train it, and one micro-batch."""

    model: Any
    given: Any
    batch: Any
    objective: Objective
    rows: int
    length: int
    steps: int | None  # None where only the data says
    varied: bool = False  # batches differ in shape
    said: str = ""

    def plan(self, on_accelerator: bool, moments: Moments | None = None) -> Plan:
        """Its memory and arithmetic. moments: if they are known."""
        given, steps = self.given, self.steps or DRIFTS_AFTER
        made = plan(
            self.model,
            self.objective,
            self.batch,
            optimizer=given.optimizer,
            kept_as=given.weights,
            page_budget=given.page_budget * 1e6,
            micro_steps=given.micro_steps,
            steps=steps,
            checkpoint=not on_accelerator and copies(given, steps if self.steps else given.checkpoint_every + 1),
            recompute=given.recompute,
            length=self.length,
            varied=self.varied,
            on_accelerator=on_accelerator,
            moments=moments,
        )
        if getattr(given, "forget_budget", None) is None:
            return made
        kept = sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)
        return dataclasses.replace(made, kept=kept, checkpoint=made.checkpoint + (kept if made.checkpoint else 0))


def subject(operation: str, source: Path, given: Any, *, read_data: bool = False) -> Subject:
    """The subject of a training operation. read_data: its batches come from the data, encoded and packed.

    Raises SettingsError, DataError, ConfigError.
    """
    given, said = chosen(given, source) if isinstance(given, Sized) else (given, "")
    given = masked.with_class(given) if isinstance(given, masked.Settings) else given
    if given.parallel == "none" and given.offload:
        raise SettingsError("offload needs parallel = zero2, zero3 or hybrid.")
    model = model_of(operation, source, given)
    model.compute_dtype = COMPUTE[given.precision]
    batch, objective, rows, length = synthetic(operation, model, given)
    steps, varied = given.steps, False
    if read_data and operation.startswith("tune ") and hasattr(given, "pack"):
        from bildung.tune.instruction import prepare

        data = prepare(Tokenizer.load(source), given)
        steps = steps_of(given, data.batch_at.batches_per_epoch)
        batch, varied = largest(data.batch_at, steps * given.micro_steps)
        rows, length = batch.tokens_BL.shape
    return Subject(model, given, batch, objective, rows, length, steps, varied, said)


def model_of(operation: str, source: Path, given: Any) -> Any:
    """The model as the operation would train it, without numbers. (A quantized one and one with adapters is loaded: how
    its matrices are stored stands in its files.)"""
    if (source / "config.json").exists():
        config = read_config(source)
    elif getattr(given, "model", None) is not None:
        keys = yaml.safe_load(given.model)
        config = from_dict(keys) if operation == "pretrain image" else config_for(Tokenizer.load(source), keys)
    elif (source / "adapter_config.json").exists() or source.suffix in (".gguf", ".onnx"):
        config = None
    else:
        new = " (--given 'model={...}', the keys of its config.json, for a new one)" if hasattr(given, "model") else ""
        what = "holds no model" if source.exists() else "is not there"
        raise SettingsError(f"{source} {what}; give the directory of one{new}.")
    frozen = getattr(torch, FROZEN[given.precision])
    plain = config is not None and "quantization_config" not in config.raw
    if isinstance(given, classify.Settings):  # its own head, of a few classes; all is read in float32
        frozen = torch.float32
        if config is not None and plain:
            config = headed(config, {"0": "0", "1": "1"}, PROBLEM_TYPE[given.problem])
    if isinstance(given, long_lora.Settings):  # in float32, with a longer context, in groups that are shifted
        long_lora.check_groups(given.length, given.share)
        frozen = torch.float32
        if config is not None:
            config = long_lora.longer_config(config, given.length, given.scaling)
    add = addition(operation, given)
    if config is None or not plain:
        lm = load(source, frozen if add is not None else "float32")
        if add is None:
            check_trainable(lm, source)
        model = lm.model
    else:
        model = on_paper(config)
    if add is None:
        return model.requires_grad_(True)
    if plain:
        model = model.to(frozen)
    whole = LanguageModel(model, Tokenizer.load(source), model.config)
    add(whole if operation in ("tune prompt", "tune prefix", "tune classify") else model, given)
    return model


def addition(operation: str, given: Any) -> Callable[[Any, Any], Any] | None:
    """What freezes the model and adds what trains: `add_NAME` of bildung/tune/NAME.py; None when all of it trains."""
    from bildung.tune.lora import Options, add_lora

    if getattr(given, "full", False) or (hasattr(given, "rank") and given.rank is None):
        return None
    if isinstance(given, classify.Settings | classify_words.Settings):
        if given.method == "full":
            return None
        if isinstance(given, classify.Settings):
            return lambda lm, chosen: choose_trained(lm, chosen, chosen.seed)
        return lambda model, chosen: add_lora(model, Options(rank=chosen.rank, alpha=chosen.alpha))
    if operation == "continual train":
        return lambda model, chosen: add_lora(model, Options(rank=chosen.rank, alpha=2.0 * chosen.rank))
    own = getattr(find(operation, verbs()).load(), f"add_{operation.partition(' ')[2]}", None)
    return own if own is not None or not hasattr(given, "rank") else add_lora


def synthetic(operation: str, model: Any, given: Any) -> tuple[Any, Objective, int, int]:
    """(batch, objective, rows, length) of the largest micro-batch that the settings allow: full rows, all learned."""
    config, rows = model.config, given.batch_size
    length = next((value for name in ("window", "max_length", "length") if (value := getattr(given, name, None))), None)
    if config.kind == "vision":
        pixels_BCHW = torch.zeros(rows, config.image.num_channels, *config.image.image_size)
        return ImageBatch(pixels_BCHW, torch.zeros(rows, dtype=torch.long)), classify_images, rows, 1
    length = min(length or config.max_position_embeddings, getattr(config, "max_position_embeddings", None) or 2**30)
    tokens = getattr(given, "batch_tokens", None)  # of a batch of rows of similar length
    if config.kind in ("encoder-decoder", "seq2seq"):
        target_length = getattr(given, "max_target", None) or length
        if tokens:
            rows = max(1, tokens // max(length, target_length))
        source_BS = torch.zeros(rows, length, dtype=torch.long)
        batch = Seq2SeqBatch(source_BS, torch.ones_like(source_BS, dtype=torch.bool), text(rows, target_length))
        return batch, seq2seq, rows, length
    if operation == "align dpo":
        rows *= 2
        return text(rows, length, packed=given.pack), policy, rows, length
    if tokens:
        rows = max(1, tokens // length)
    one = text(rows, length, packed=getattr(given, "pack", operation != "tune long_lora"))
    if isinstance(given, long_lora.Settings):
        return one, partial(in_groups, given.share), rows, length
    types_BL, labels_B = torch.zeros_like(one.tokens_BL), torch.zeros(rows, dtype=torch.long)
    if config.kind != "encoder" and operation != "tune classify":
        return one, clm, rows, length
    if operation in ("tune classify", "continual train"):
        return TextBatch(one.tokens_BL, one.keep_BL, types_BL, labels_B), classify_texts, rows, length
    chosen_BL = torch.zeros_like(one.keep_BL)
    chosen_BL[:, : max(1, round(given.share * length))] = True
    hidden = MaskedBatch(one.tokens_BL, one.tokens_BL, chosen_BL, one.keep_BL, types_BL, labels_B)
    return hidden, mlm if given.objective == "mlm" else mlm_nsp, rows, length


def text(rows: int, length: int, packed: bool = False) -> Batch:
    """Rows without padding whose every token is a target; packed: each of two texts."""
    tokens_BL = torch.zeros(rows, length, dtype=torch.long)
    is_target_BL = torch.ones(rows, length, dtype=torch.bool)
    is_target_BL[:, 0] = False
    positions_BL = torch.arange(length).expand(rows, length).contiguous()
    segments_BL = 1 + (positions_BL >= length // 2).long() if packed else None
    return Batch(tokens_BL, is_target_BL, torch.ones_like(is_target_BL), positions_BL, segments_BL)


def in_groups(share: float, model: Any, batch: Batch) -> LossSum:
    """LongLoRA's loss: attention stays in groups of that share of a row, shifted."""
    with shifted(model, share):
        return clm(model, batch)


def policy(model: Any, batch: Batch) -> LossSum:
    """What DPO's loss is made of: the summed log-probabilities of each sequence."""
    logprobs_S: Tensor = token_logprobs(model, batch)
    return LossSum(-logprobs_S.sum(), len(logprobs_S))


def classify_images(model: Any, batch: ImageBatch) -> LossSum:
    """An image classifier's loss; of a model without a head, of its states."""
    if model.classifier is None:
        h = model.hidden(batch.pixels_BCHW)
        return LossSum(h.float().square().sum(), len(h))
    return Classify(image_logits)(model, batch)


def classify_texts(model: Any, batch: TextBatch) -> LossSum:
    """A text classifier's loss; of a model without a head, of its states."""
    if getattr(model, "classifier", None) is not None or isinstance(model, DecoderClassifier):
        return Classify(classify.text_logits)(model, batch)
    h_BLD = model.hidden(batch.tokens_BL, keep_BL=batch.keep_BL)
    return LossSum(h_BLD[:, 0].float().square().sum(), len(h_BLD))


def runtime() -> int:
    """Bytes of this process, which has loaded what a training loads, with its kernels."""
    import psutil

    return int(psutil.Process().memory_info().rss) + KERNELS

"""From a config to a model: the right class without numbers (`make`), or with fresh random ones (`build`).

The starting weights are stated, not left to chance (config.init):

    normal      matrices and embeddings N(0, initializer_range²), biases 0, norms 1          Llama, BERT
    gpt2        the same, but what writes into the stream divided by sqrt(2 · layers)         Radford et al. 2019
    truncated   the normal cut off at 2 standard deviations                                   ViT
    xavier      U(±sqrt(6 / (in + out))), embeddings N(0, 1/D)                                Glorot & Bengio 2010
    t5          N(0, 1/in) per matrix, queries also divided by sqrt(head_dim), embeddings N(0, 1)    Raffel et al. 2020

Recurrent models bring their own (rnn.py, seq2seq.py). The same seed gives the same weights on every machine (drawn on
the CPU, in parameter order).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bildung.model.base import Model
from bildung.model.block import LayerScale
from bildung.model.config import BaseConfig, ModelConfig
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.encoder import Encoder
from bildung.model.encoder_decoder import EncoderDecoder
from bildung.model.layers import BatchNorm, LayerNorm, RMSNorm
from bildung.model.rnn import RecurrentLM
from bildung.model.seq2seq import Seq2Seq
from bildung.model.transformer import Decoder
from bildung.model.vit import VisionTransformer

NORMS = (RMSNorm, LayerNorm, BatchNorm)


def make(config: BaseConfig) -> Any:
    """The model of that kind, its weights not set."""
    kinds: dict[str, type[Model]] = {
        "decoder": Decoder,
        "classifier": DecoderClassifier,
        "encoder": Encoder,
        "encoder-decoder": EncoderDecoder,
        "vision": VisionTransformer,
        "recurrent": RecurrentLM,
        "seq2seq": Seq2Seq,
    }
    return kinds[config.kind](config)


def build(config: BaseConfig, seed: int = 0, only: Callable[[str], bool] | None = None) -> Any:
    """A model with random float32 weights, ready to train.

    only: whether the parameter of that name gets its numbers; the others are left on the meta device, to be put there.
    Those that are drawn are the same then: each matrix is, and those that nobody wants are dropped one by one.
    """
    with contextlib.nullcontext() if only is None else torch.device("meta"):
        model = make(config)
    generator = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()  # a tied unembedding is the embedding, and starts as one
    with torch.no_grad():
        if isinstance(model, RecurrentLM | Seq2Seq):
            model.draw(generator)
            return model
        for name, module in model.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in drawn:
                    weight = parameter if only is None else torch.empty(parameter.shape)
                    _draw(f"{name}.{leaf}", module, leaf, weight, config, generator)
                    if only is not None and only(f"{name}.{leaf}"):
                        setattr(module, leaf, nn.Parameter(weight))
                drawn.add(id(parameter))
    return model


def _draw(name: str, module: nn.Module, leaf: str, weight: Tensor, config: Any, generator: torch.Generator) -> None:
    """Set one parameter in place."""
    if isinstance(module, NORMS):
        offset = getattr(module, "offset", 0.0)
        weight.fill_(1.0 - offset if leaf in ("weight", "running_var") else 0.0)
    elif isinstance(module, LayerScale):
        weight.fill_(config.layer_scale)
    elif leaf in ("bias", "sinks_N", "mask_token", "final_logits_bias"):
        weight.zero_()
    else:
        _draw_matrix(name, weight, config, generator)


def _draw_matrix(name: str, weight: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    spread = config.initializer_range
    is_embedding = any(word in name for word in ("embed", "shared", "token_types", "cls_token", "register_tokens"))
    if config.init == "truncated":
        nn.init.trunc_normal_(weight, 0.0, spread, -2 * spread, 2 * spread, generator=generator)
    elif config.init == "xavier" and not is_embedding:
        nn.init.xavier_uniform_(weight, generator=generator)
    elif config.init == "xavier":
        weight.normal_(0.0, config.hidden_size**-0.5, generator=generator)
    elif config.init == "t5":
        # initializer_range is T5's initializer_factor, of all of them.
        weight.normal_(0.0, spread * _t5_spread(name, weight, config, is_embedding), generator=generator)
    else:
        into_stream = name.endswith(("o_proj.base.weight", "down_proj.base.weight"))
        if config.init == "gpt2" and into_stream:
            spread /= math.sqrt(2 * config.num_hidden_layers)
        weight.normal_(0.0, spread, generator=generator)


def _t5_spread(name: str, weight: Tensor, config: ModelConfig, is_embedding: bool) -> float:
    if "q_proj" in name:
        return float((weight.shape[1] * config.head_dim) ** -0.5)
    if is_embedding:
        return 1.0
    if "bias." in name:  # the relative bias, (buckets, heads)
        return float(config.hidden_size**-0.5)
    return float(weight.shape[1] ** -0.5)

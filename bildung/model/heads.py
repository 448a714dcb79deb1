"""What stands on top of a stack besides the unembedding: heads that turn states into labels or masked tokens.

Which ones a checkpoint has is said by `architectures` in its config.json; `config.heads` names them:

    pooler     tanh(W h[CLS])                                    BERT's sentence vector
    mlm        norm(act(W h)), then the tied unembedding + bias    masked tokens
    nsp        pooler -> 2                                         is the second segment the next one?
    classify   a sentence's (or image's) class                     labels B C
    classify_tanh, classify_relu   a sentence's, from the first token by a dense layer: RoBERTa, DistilBERT
    classify_mean   an image's, from [CLS] and the patches' mean    DINOv2
    tag        every token's class                                 labels B L C
"""

# B batch, L length, D hidden_size, C classes

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.model.config import ModelConfig
from bildung.model.layers import activation, norm_from
from bildung.model.linear import dense_linear


class Pooler(nn.Module):
    """tanh(W h_0 + b): the state of the first token, [CLS], transformed (Devlin et al. 2019)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = dense_linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, h_BLD: Tensor) -> Tensor:
        return torch.tanh(self.dense(h_BLD[:, 0]))


class MaskedLMTransform(nn.Module):
    """norm(act(W h + b)): BERT's step between the last state and the tied unembedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = dense_linear(config.hidden_size, config.hidden_size, bias=True)
        self.layernorm = norm_from(config)
        self.act = activation(config.transform_act or config.hidden_act)

    def forward(self, h_BLD: Tensor) -> Tensor:
        normed: Tensor = self.layernorm(self.act(self.dense(h_BLD)))
        return normed


class ClassificationHead(nn.Module):
    """dropout, a dense layer with its activation if the family has one, dropout, one row per class. It reads vectors of
    `size` (default: hidden_size)."""

    def __init__(self, config: ModelConfig, num_labels: int, act: str | None = None, size: int | None = None):
        super().__init__()
        self.dense = dense_linear(config.hidden_size, config.hidden_size, bias=True) if act else None
        self.act = activation(act) if act else None
        self.out_proj = dense_linear(size or config.hidden_size, num_labels, bias=True)
        self.dropout = config.classifier_dropout
        self.dropout_below = 0.0 if act == "relu" else self.dropout  # DistilBERT's dense layer reads the whole state

    def forward(self, h_BD: Tensor) -> Tensor:
        h_BD = F.dropout(h_BD, self.dropout_below, self.training)
        if self.dense is not None and self.act is not None:
            h_BD = F.dropout(self.act(self.dense(h_BD)), self.dropout, self.training)
        return self.out_proj(h_BD)

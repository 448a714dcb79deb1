"""BERT's objectives: what stood at the masked places, and whether the second segment follows the first.

    mlm         mean over masked places of -log p(token)                     unembedded there only, 15 % of the places
    nsp         mean over pairs of -log p(is next)                           read from [CLS]
    mlm_nsp     their sum (Devlin et al. 2019): one pass through the model serves both

An objective returns sums (see fit.py). The sum of two means over different numbers of things becomes one sum over
masked places, in which each pair weighs (masked places / pairs).
"""

# B pairs, L length, N masked places, D hidden size, V vocabulary

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import DataError
from bildung.data.masking import MaskedBatch
from bildung.model.encoder import Encoder
from bildung.train.loss import LossSum


def mlm(model: Encoder, batch: MaskedBatch) -> LossSum:
    """Sum of -log p of the tokens that were chosen; metric: how many of them are the most probable."""
    return _mlm(model, batch, _states(model, batch))


def nsp(model: Encoder, batch: MaskedBatch) -> LossSum:
    """Sum of -log p of the pairs' labels (0 = next, 1 = random, or swapped); metric: how many are right.

    Raises DataError for a batch without labels.
    """
    return _nsp(model, batch, _states(model, batch))


def mlm_nsp(model: Encoder, batch: MaskedBatch) -> LossSum:
    """The sum of both means; metrics: each loss and each accuracy."""
    h_BLD = _states(model, batch)
    tokens, pairs = _mlm(model, batch, h_BLD), _nsp(model, batch, h_BLD)
    weight = tokens.count / pairs.count
    metrics = {"mlm_loss": tokens.total.detach(), "nsp_loss": pairs.total.detach() * weight, **tokens.metrics}
    metrics |= {name: value * weight for name, value in pairs.metrics.items()}
    return LossSum(tokens.total + pairs.total * weight, tokens.count, metrics)


def _states(model: Encoder, batch: MaskedBatch) -> Tensor:
    return model.hidden(
        batch.tokens_BL,
        keep_BL=batch.keep_BL,
        types_BL=batch.types_BL,
        positions_BL=batch.positions_BL,
        segments_BL=batch.segments_BL,
    )


def _mlm(model: Encoder, batch: MaskedBatch, h_BLD: Tensor) -> LossSum:
    targets_N = batch.targets_BL[batch.chosen_BL]
    logits_NV = model.unembed(h_BLD[batch.chosen_BL]).float()
    right = (logits_NV.argmax(-1) == targets_N).sum()
    return LossSum(F.cross_entropy(logits_NV, targets_N, reduction="sum"), len(targets_N), {"mlm_accuracy": right})


def _nsp(model: Encoder, batch: MaskedBatch, h_BLD: Tensor) -> LossSum:
    if batch.labels_B is None:
        raise DataError("these texts are no pairs; next-sentence prediction needs some (see data/sentence_pairs.py).")
    logits_B2 = model.next_sentence(h_BLD).float()
    right = (logits_B2.argmax(-1) == batch.labels_B).sum()
    total = F.cross_entropy(logits_B2, batch.labels_B, reduction="sum")
    return LossSum(total, len(batch.labels_B), {"nsp_accuracy": right})

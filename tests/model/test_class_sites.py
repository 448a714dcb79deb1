"""The sites of a classifier on an encoder: what it reads, and its logits."""

from __future__ import annotations

import torch

from bildung.model.taps import intervene, observe, sites
from tests.model.tiny_encoder import tiny_encoder


def test_pooled_and_class_logits_are_sites() -> None:
    model = tiny_encoder("BertForSequenceClassification", num_labels=3).model
    assert sites(model)["pooled"] == "B D" and sites(model)["class_logits"] == "B C"
    h_BLD = model.hidden(torch.tensor([[2, 40, 41, 3], [2, 42, 43, 3]]))
    with observe(model, ["pooled", "class_logits"]) as seen:
        logits_BC = model.classify(h_BLD)
    assert seen["pooled"].shape == (2, 32) and torch.equal(seen["class_logits"], logits_BC)
    with intervene(model, {"pooled": torch.zeros_like}):
        assert torch.equal(model.classify(h_BLD), model.classifier.out_proj.bias.expand(2, 3))
    assert "pooled" not in sites(tiny_encoder("BertModel").model)

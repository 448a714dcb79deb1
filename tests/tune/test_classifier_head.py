"""The head that a classifier gets, and what happens to the layers below it on the way."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.core.operation import Job
from bildung.model import build as build_module
from bildung.model.build import build
from bildung.model.linear import replace_stores
from bildung.model.nf4 import Nf4
from bildung.model.store import LanguageModel
from bildung.tune.classifier_head import with_classifier
from tests.model.tiny_encoder import tiny_encoder


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_quantized_layers_are_never_dense_on_the_way_to_a_classifier(
    kind: str, tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no time more than one matrix that nobody wants is there; the head is the one of a whole new model."""
    lm = tiny_lm if kind == "decoder" else tiny_encoder("BertForPreTraining")
    replace_stores(lm.model, "*.layers.*", lambda linear: Nf4.quantize(linear.base.dense().detach()))
    draw, alive, most = build_module._draw, list[Any](), [0]

    def noted(name: str, module: Any, leaf: str, weight: torch.Tensor, *rest: Any) -> None:
        if ".layers." in name and weight.ndim == 2:
            alive[:] = [one for one in alive if one() is not None] + [weakref.ref(weight)]
            most[0] = max(most[0], len(alive))
        draw(name, module, leaf, weight, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_draw", noted)
        made = with_classifier(Job("-", None, tmp_path, None), lm, ("a", "b", "c"), 5)
    assert most[0] == 1
    theirs = made.model.linears()
    stored = [name for name, linear in lm.model.linears().items() if isinstance(linear.base, Nf4)]
    assert len(stored) > 8 and all(theirs[name].base is lm.model.linears()[name].base for name in stored)
    assert not any(parameter.is_meta for parameter in made.model.parameters())
    whole = dict(build(made.config, 5).named_parameters())
    old = dict(lm.model.named_parameters())
    fresh = [name for name in dict(made.model.named_parameters()) if name not in old]
    assert fresh and all(torch.equal(dict(made.model.named_parameters())[name], whole[name]) for name in fresh)
    again = bildung.load(bildung.save(made, tmp_path / "saved"))
    tokens_BL = torch.tensor([[2, 40, 41, 42, 3]])
    with torch.no_grad():
        logits = [(one.model.classes if kind == "encoder" else one.model)(tokens_BL) for one in (made, again)]
    assert torch.allclose(*logits, atol=1e-5)

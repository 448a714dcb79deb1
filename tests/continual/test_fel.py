"""Fixed expansion layers: so many units are triggered, the fixed weights stay, errors pass triggered units only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bildung
from bildung.continual.fel import FelSettings, FixedExpansion, expansion, sparse_code
from bildung.continual.train import Settings, train
from bildung.core.errors import SettingsError

FEL = {"units": 64, "positive": 6, "negative": 4, "fan_in": 8, "members": 2}


def test_the_largest_and_the_least_are_triggered_and_pass_the_error() -> None:
    a_BE = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    code_BE = sparse_code(a_BE, 6, 4)
    assert bool(((code_BE == 1).sum(-1) == 6).all()) and bool(((code_BE == -1).sum(-1) == 4).all())
    assert bool(((code_BE == 0).sum(-1) == 30).all())
    order = a_BE.detach().argsort(-1)
    assert bool((code_BE.gather(1, order)[:, -6:] == 1).all() and (code_BE.gather(1, order)[:, :4] == -1).all())
    upstream = torch.arange(1.0, 41.0).expand(5, -1)
    (grad_BE,) = torch.autograd.grad(code_BE, a_BE, upstream)
    assert torch.equal(grad_BE, upstream * code_BE.detach().abs())


def test_a_unit_reads_some_features_half_of_them_inhibitory() -> None:
    W_ED = expansion(32, 64, 8, torch.Generator().manual_seed(0))
    assert bool(((W_ED > 0).sum(-1) == 4).all() and ((W_ED < 0).sum(-1) == 4).all())
    torch.testing.assert_close(W_ED.norm(dim=-1), torch.ones(64))
    assert len({tuple(row.nonzero()[:, 0].tolist()) for row in W_ED}) > 60


def test_each_text_trains_one_member_and_all_are_averaged_afterwards() -> None:
    fel = FixedExpansion(32, 3, **FEL, seed=0)
    fel.output_MCE.data.normal_(generator=torch.Generator().manual_seed(1))
    pooled_BD, unused_BC = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)), torch.zeros(4, 3)

    def run() -> torch.Tensor:
        fel.see("pooled", pooled_BD)
        return fel(unused_BC)

    codes = [sparse_code(pooled_BD @ W.t(), 6, 4) for W in fel.W_MED]
    members = torch.stack([code @ out.t() for code, out in zip(codes, fel.output_MCE, strict=True)])
    fel.eval()
    torch.testing.assert_close(run(), members.mean(0))
    fel.train()
    run()[0].sum().backward()
    assert sorted(float(grad.abs().sum()) > 0 for grad in fel.output_MCE.grad) == [False, True]


def test_a_sequence_keeps_the_fixed_weights(encoder: Path, given: Callable[..., Settings], tmp_path: Path) -> None:
    settings = given(method="fel", steps=80, learning_rate=2e-2, fel=FEL)
    measured = train(encoder, tmp_path / "out", settings).measured
    assert measured["scores"][0]["pets"]["score"] > 0.8 > measured["scores_before"]["pets"]["score"]
    source = bildung.load(encoder).model
    one, two = (bildung.load(tmp_path / "out" / name).model for name in ("1-pets", "2-times"))
    layers = [model.attached["class_logits"] for model in (one, two)]
    assert torch.equal(layers[0].W_MED, layers[1].W_MED) and not torch.equal(layers[0].output_MCE, layers[1].output_MCE)
    kept = {name: tensor for name, tensor in source.state_dict().items() if name.startswith("model.")}
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in kept.items())
    assert not torch.equal(one.pooler.dense.base.weight, two.pooler.dense.base.weight)


def test_what_is_refused(encoder: Path, given: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="a unit has 32 features to read"):
        train(encoder, tmp_path / "out", given(method="fel", fel={"fan_in": 33}))
    with pytest.raises(SettingsError, match=r"positive = 40 and negative = 30 were given"):
        FelSettings(units=64, positive=40, negative=30)

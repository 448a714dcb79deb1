"""Adapters that start as what quantization took: theorem 1 of QERA, and QLoRA started there."""

from __future__ import annotations

import pytest
import torch

import bildung
from bildung.compress.quantize import Settings as Quantize
from bildung.compress.quantize import quantize
from bildung.core.errors import ModelFileError, SettingsError
from bildung.tune.qera import DAMPING, reconstruction
from bildung.tune.qlora import Settings, qlora


def test_no_matrix_of_the_rank_has_a_smaller_error_of_outputs():
    """The least mean |x (E - C)ᵀ|² over C of rank r: the squares of the singular values of E R^½ that are left out."""
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    error_OI = torch.randn(40, 24, generator=generator)
    moment_II = x_NI.t() @ x_NI / len(x_NI)
    # the moment as it is damped inside, so that the optimum below is the very one sought
    damped_II = moment_II + DAMPING * moment_II.diag().mean() * torch.eye(24)

    def lost(change_OI):
        left_OI = error_OI - change_OI
        return float(((left_OI @ damped_II) * left_OI).sum())

    value_I, vector_II = torch.linalg.eigh(damped_II)
    singular_I = torch.linalg.svdvals(error_OI @ (vector_II * value_I.sqrt()) @ vector_II.t())
    for rank in (1, 5, 24):
        lora_A, lora_B = reconstruction(error_OI, moment_II, rank)
        assert lora_A.shape == (rank, 24) and lora_B.shape == (40, rank)
        least = float(singular_I[rank:].square().sum())
        assert lost(lora_B @ lora_A) == pytest.approx(least, rel=1e-3, abs=1e-3 * float(singular_I.square().sum()))
    u, s, v = torch.linalg.svd(error_OI, full_matrices=False)
    plain = lost((u[:, :5] * s[:5]) @ v[:5])
    assert lost(reconstruction(error_OI, moment_II, 5)[1] @ reconstruction(error_OI, moment_II, 5)[0]) < 0.9 * plain


@pytest.fixture
def nf4(tiny_lm_directory, tmp_path):
    quantize(tiny_lm_directory, tmp_path / "nf4", Quantize(method="nf4"))
    return tmp_path / "nf4"


def test_qlora_from_the_error_starts_at_the_original(tiny_lm_directory, nf4, given, tmp_path, logits):
    """With the full rank of the narrowest matrix most of the distance to the original is gone before any step."""
    narrow = min(min(one.in_features, one.out_features) for one in bildung.load(nf4).model.linears().values())
    still = {**given, "rank": narrow, "dropout": 0.0, "steps": 1, "learning_rate": 1e-12, "warmup": 0.0}
    record = qlora(nf4, tmp_path / "out", Settings(**still, reconstruct=tiny_lm_directory, reconstruct_batches=4))
    assert record.measured["reconstructed_matrices"] == 14 and "original" in record.companions
    original = logits(bildung.load(tiny_lm_directory))
    before = (logits(bildung.load(nf4)) - original).norm()
    after = (logits(bildung.load(tmp_path / "out")) - original).norm()
    assert after < 0.5 * before


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"dora": True}, SettingsError, "neither with dora"),
        ({"initialise": "pissa"}, SettingsError, "initialise = 'pissa'"),
        ({"reconstruct_batches": 0}, SettingsError, "at least 1"),
        ({"reconstruct": "nf4"}, ModelFileError, "quantized or adapted itself"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(tiny_lm_directory, nf4, given, tmp_path, change, error, said):
    change = {name: nf4 if value == "nf4" else value for name, value in change.items()}
    with pytest.raises(error, match=said):
        qlora(nf4, tmp_path / "out", Settings(**{**given, "rank": 4, "reconstruct": tiny_lm_directory, **change}))

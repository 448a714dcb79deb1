"""`bildung tune stretch`: longer tables in every family that has one, and what cannot be stretched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import bildung
from bildung.core.errors import DataError, ModelFileError, SettingsError
from bildung.model.low_rank import LowRank
from bildung.tune.stretch import Settings, stretch
from tests.contract.test_families import CONFIGS, KINDS, SOURCE, TARGET, made, run

LEARNED = [
    name for name in CONFIGS if getattr(made(name).config, "positions", "") == "learned" and KINDS[name] != "vision"
]


@pytest.mark.parametrize("family", LEARNED)
def test_the_table_is_drawn_out_between_its_ends(family: str, tmp_path: Path) -> None:
    lm = made(family)
    source = bildung.save(lm, tmp_path / "source")
    old = lm.config.max_position_embeddings
    record = stretch(source, tmp_path / "long", Settings(positions=2 * old - 1))
    longer = bildung.load(tmp_path / "long")
    assert record.measured == {"positions_before": old, "positions_after": 2 * old - 1}
    for (path, parameter), (_, before) in zip(
        longer.model.named_parameters(), lm.model.named_parameters(), strict=True
    ):
        if "embed_positions" not in path:
            assert torch.equal(parameter, before), path
            continue
        offset = lm.config.position_offset
        assert parameter.shape[0] == 2 * old - 1 + offset and torch.equal(parameter[:offset], before[:offset])
        torch.testing.assert_close(parameter[offset::2], before[offset:])
    long_text = torch.cat([TARGET[:1]] * 8, dim=1)[:, : old + 10]
    arguments = (SOURCE[:1], long_text) if lm.config.kind == "encoder-decoder" else (long_text,)
    assert torch.isfinite(longer.model(*arguments)).all()
    with pytest.raises(DataError, match="beyond the table"):
        lm.model(*arguments)


def test_transformers_reads_the_longer_model(tmp_path: Path) -> None:
    stretch(bildung.save(made("gpt2"), tmp_path / "source"), tmp_path / "long", Settings(positions=100))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    longer = bildung.load(tmp_path / "long").model
    with torch.no_grad():
        torch.testing.assert_close(peer(TARGET).logits, run(longer), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_stretched(tmp_path: Path) -> None:
    source = bildung.save(made("llama"), tmp_path / "llama")
    with pytest.raises(ModelFileError, match="not a learned table"):
        stretch(source, tmp_path / "out", Settings(positions=100))
    with pytest.raises(SettingsError, match="at least two"):
        stretch(source, tmp_path / "out", Settings(positions=1))
    base = bildung.save(made("gpt2"), tmp_path / "gpt2")
    lm = bildung.load(base)
    linear = lm.model.linears()["model.layers.0.mlp.up_proj"]
    linear.deltas["tuned"] = LowRank(48, 80, 2, 1.0)
    torch.nn.init.normal_(linear.deltas["tuned"].lora_B)
    with pytest.raises(ModelFileError, match="merge"):
        stretch(bildung.save(lm, tmp_path / "adapter"), tmp_path / "out", Settings(positions=100))

"""A value per position: of the final state, beside unchanged logits, saved with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.core.errors import SettingsError
from bildung.model.value_head import add_value_head, values


def test_a_value_of_every_position_beside_the_same_logits(tiny_lm: Any, tmp_path: Path) -> None:
    lm = bildung.load(tiny_lm.path)
    tokens_BL = torch.arange(10).view(2, 5)
    with pytest.raises(SettingsError, match="add_value_head"):
        values(lm.model, lm.model.hidden(tokens_BL))
    before_BLV = lm.model(tokens_BL)
    head = add_value_head(lm.model)
    assert not values(lm.model, lm.model.hidden(tokens_BL)).any()
    torch.nn.init.normal_(head.weight_D)
    torch.nn.init.constant_(head.bias_1, 0.5)
    h_BLD = lm.model.hidden(tokens_BL)
    torch.testing.assert_close(values(lm.model, h_BLD), h_BLD.float() @ head.weight_D + 0.5)
    bildung.save(lm, tmp_path / "critic")
    again = bildung.load(tmp_path / "critic")
    torch.testing.assert_close(values(again.model, again.model.hidden(tokens_BL)), values(lm.model, h_BLD))
    assert torch.equal(again.model(tokens_BL), before_BLV)

"""An update that makes weights infinite or no number: never the newest checkpoint, nor what comes out, unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bildung.core.errors import TrainingError
from bildung.data.batches import clm_examples, pad
from bildung.model.store import LanguageModel
from bildung.train.checkpoint import all_in, step_of
from bildung.train.fit import fit
from bildung.train.objectives import clm


class Spoiling(torch.optim.SGD):
    """Steps like any other, but the third one writes an infinity into one matrix."""

    taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.taken += 1
        if self.taken == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][3].view(-1)[0] = float("inf")


def run(lm: LanguageModel, out: Path | None, steps: int, every: int, **more: Any) -> None:
    batch = pad(clm_examples(lm.tokenizer, ["The capital of France is Paris."], 32), lm.tokenizer.pad_id)
    lm.model.requires_grad_(True)
    optimizer = Spoiling(lm.model.parameters(), lr=1e-3)
    fit(lm.model, lambda n: batch, clm, optimizer, steps=steps, out=out, checkpoint_every=every, **more)


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("steps", [3, 9])
def test_it_is_no_checkpoint_and_the_one_before_stays(
    tiny_lm: LanguageModel, tmp_path: Path, steps: int, in_background: bool
) -> None:
    """Whether the run ends with that step or the next one meets its weights."""
    with pytest.raises(TrainingError) as caught:
        run(tiny_lm, tmp_path, steps, 1, async_checkpoints=in_background)
    assert [step_of(place) for place in all_in(tmp_path)] == [2]
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "step 3: its update made weights infinite or no number (layers" in said
    assert "What was learned up to step 2 is kept." in said and "leads here again" not in said


def test_nor_is_it_what_comes_out(tiny_lm: LanguageModel) -> None:
    with pytest.raises(TrainingError, match=r"step 3: its update made weights infinite .* No checkpoint is kept"):
        run(tiny_lm, None, 3, 0)


def test_finite_weights_that_lead_to_no_number_are_said_to(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    """A learning rate of 1e30 leaves numbers, of which the next loss is none."""
    batch = pad(clm_examples(tiny_lm.tokenizer, ["The capital of France is Paris."], 32), tiny_lm.tokenizer.pad_id)
    optimizer = torch.optim.AdamW(tiny_lm.model.requires_grad_(True).parameters(), 1e30)
    with pytest.raises(TrainingError, match=r"step 2: .* up to step 1 is kept.* leads here again"):
        fit(tiny_lm.model, lambda n: batch, clm, optimizer, steps=5, out=tmp_path, checkpoint_every=1)

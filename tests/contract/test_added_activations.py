"""Prompts, prefixes and bottlenecks on every family that takes them, and over every way a base is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.core.errors import AdapterError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import replace_stores
from bildung.model.quantized import METHODS
from bildung.model.store import LanguageModel, write_attached
from bildung.model.virtual import Prompt, add_virtual, remove_virtual
from bildung.tune import adapter, prefix, prompt
from tests.contract.test_families import CONFIGS
from tests.model.tiny import tiny_lm

ROWS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
MADE = {family: from_dict({"model_type": family, **keys}) for family, keys in CONFIGS.items()}
DECODERS = [family for family, config in MADE.items() if config.kind == "decoder"]
WAYS: dict[str, Any] = {
    "prompt": lambda lm: prompt.add_prompt(lm, prompt.Settings(data="none", length=3)),
    "prefix": lambda lm: prefix.add_prefix(lm, prefix.Settings(data="none", length=3)),
    "houlsby": lambda lm: adapter.add_adapter(lm.model, adapter.Settings(data="none", kind="houlsby", width=4)),
    "pfeiffer": lambda lm: adapter.add_adapter(lm.model, adapter.Settings(data="none", width=4)),
    "parallel": lambda lm: adapter.add_adapter(lm.model, adapter.Settings(data="none", kind="parallel", width=4)),
}


def made(family: str) -> LanguageModel:
    return LanguageModel(build(MADE[family], 3).eval(), tiny_lm().tokenizer, MADE[family])


@pytest.mark.parametrize("family", DECODERS)
def test_a_prompt_of_copied_tokens_reads_as_those_tokens(family: str) -> None:
    lm = made(family)
    ids = torch.tensor([7, 60, 91])
    with torch.no_grad():
        expected = lm.model(torch.cat((ids.expand(2, -1), ROWS), dim=1))[:, 3:]
        add_virtual(lm.model, Prompt(lm.model.model.vectors(ids, torch.float32)))
        torch.testing.assert_close(lm.model(ROWS), expected, atol=2e-5, rtol=1e-4)
        cache = lm.model.kv_cache(2, 9)
        steps = [lm.model(ROWS[:, i : i + 1], kv_cache=cache) for i in range(9)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=2e-5, rtol=1e-4)
        remove_virtual(lm.model)
        torch.testing.assert_close(lm.model(torch.cat((ids.expand(2, -1), ROWS), dim=1))[:, 3:], expected)


@pytest.mark.parametrize(
    "family", [name for name, one in MADE.items() if one.kind in ("vision", "recurrent", "seq2seq")]
)
def test_other_kinds_are_refused_by_name(family: str) -> None:
    with pytest.raises(AdapterError, match=f"{MADE[family].model_type} of kind '{MADE[family].kind}'"):
        add_virtual(build(MADE[family], 3), Prompt(torch.zeros(3, 8)))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_over_every_base(family: str, stored: str, tmp_path: Path) -> None:
    """Only what was added trains, a step along the gradient lowers the loss, and what is saved is what was learned."""
    lm = made(family)
    if stored in METHODS:
        replace_stores(lm.model, "all", lambda linear: METHODS[stored].quantize(linear.base.dense().detach()))
    elif stored == "bfloat16":
        lm.model.to(torch.bfloat16)
    base = bildung.save(lm, tmp_path / "base")
    for way, add in WAYS.items():
        lm = bildung.load(base)
        before = lm.model(ROWS).detach()
        add(lm)
        for one in lm.model.attached.values():
            one.draw(0.05, torch.Generator().manual_seed(2))  # from exactly 0 a first step moves little
        first = loss(lm)
        first.backward()
        added = {name for name, p in lm.model.named_parameters() if p.grad is not None}
        assert added == {name for name, p in lm.model.named_parameters() if p.requires_grad}, way
        assert all("virtual" in name or name.startswith("attached") or "norm" in name for name in added), way
        with torch.no_grad():
            size = sum(p.grad.float().square().sum() for p in lm.model.parameters() if p.grad is not None) ** 0.5
            for parameter in lm.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 / size * parameter.grad
            assert loss(lm) < first - 1e-3, way
            out = tmp_path / way
            out.mkdir()
            if lm.model.attached:
                write_attached(lm, out)
            else:
                out.rmdir()
                bildung.save(lm, out)
            again = bildung.load(out)
            assert torch.equal(again.model(ROWS), lm.model(ROWS)), way
            assert not torch.equal(again.model(ROWS), before), way


def loss(lm: LanguageModel) -> torch.Tensor:
    logits = lm.model(ROWS)[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, ROWS[:, 1:].flatten())

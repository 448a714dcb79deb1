"""Two models of one base hold it once, and leave each other alone."""

from __future__ import annotations

from pathlib import Path

import torch

import bildung
from bildung.model.linear import replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import Int8
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene
from bildung.model.twin import load_both, share_equal, twin

TOKENS = torch.tensor([[5, 6, 7, 8]])


def with_lora(lm: LanguageModel, rank: int, seed: int, pattern: str = "v_proj") -> LanguageModel:
    """Random low-rank deltas on the matching matrices."""
    generator = torch.Generator().manual_seed(seed)
    for name, linear in lm.model.linears().items():
        if pattern in name:
            delta = LowRank(linear.in_features, linear.out_features, rank, 1.0)
            with torch.no_grad():
                for parameter in delta.parameters():
                    parameter.normal_(0, 0.3, generator=generator)
            linear.deltas["tune"] = delta.eval()
    return lm


def places(lm: LanguageModel) -> set[int]:
    return {p.data_ptr() for name, p in lm.model.named_parameters() if ".deltas" not in name}


@torch.no_grad()
def test_adapters_of_one_base_share_its_numbers(tiny_lm_directory: Path, tmp_path: Path) -> None:
    paths = [
        bildung.save(with_lora(bildung.load(tiny_lm_directory), 2, seed), tmp_path / f"lora{seed}") for seed in (1, 2)
    ]
    for first, second in ((tiny_lm_directory, paths[0]), (paths[0], paths[1]), (paths[1], tiny_lm_directory)):
        a, b = load_both(first, second)
        assert places(a) == places(b) and a.path == Path(first) and b.path == Path(second)
        for lm, path in ((a, first), (b, second)):
            assert torch.equal(lm.model(TOKENS), bildung.load(path).model(TOKENS))


@torch.no_grad()
def test_a_twin_is_a_model_of_its_own(tiny_lm: LanguageModel) -> None:
    before = tiny_lm.model(TOKENS)
    other = twin(tiny_lm)
    assert other.model.lm_head.base.weight.data_ptr() == other.model.embedding.weight.data_ptr()  # tied as before
    with_lora(other, 2, 0)
    norm = other.model.model.norm.weight
    norm.data = norm.data * 2  # as adapters with norms and biases do
    with intervene(other.model, {"layers.0.mlp.out": torch.zeros_like}):
        assert torch.equal(tiny_lm.model(TOKENS), before)
        assert not torch.allclose(other.model(TOKENS), before)
    replace_stores(tiny_lm.model, "all", lambda linear: Int8.quantize(linear.base.dense()))
    assert {buffer.data_ptr() for buffer in twin(tiny_lm).model.buffers()} == {
        buffer.data_ptr() for buffer in tiny_lm.model.buffers()
    }


@torch.no_grad()
def test_what_is_equal_in_two_directories_is_held_once(tiny_lm_directory: Path, tmp_path: Path) -> None:
    edited = bildung.load(tiny_lm_directory)
    edited.model.linears()["model.layers.1.mlp.up_proj"].base.weight[0] += 1
    b_path = bildung.save(edited, tmp_path / "edited")
    a, b = load_both(tiny_lm_directory, b_path)
    differ = [
        name
        for (name, x), y in zip(a.model.named_parameters(), b.model.parameters(), strict=True)
        if x.data_ptr() != y.data_ptr()
    ]
    assert differ == ["model.layers.1.mlp.up_proj.base.weight"]
    assert torch.equal(b.model(TOKENS), edited.model(TOKENS))
    fresh = bildung.load(tiny_lm_directory)
    whole = sum({p.data_ptr(): p.nbytes for p in fresh.model.parameters()}.values())
    buffers = sum(x.nbytes for x in fresh.model.buffers())
    assert share_equal(a.model, fresh.model) == whole + buffers and share_equal(a.model, fresh.model) == 0

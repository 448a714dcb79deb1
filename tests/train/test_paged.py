"""Paged AdamW: not a bit other than AdamW, never above its budget."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bildung.core.errors import SettingsError
from bildung.train.paged import PagedAdamW

SHAPES = [(300, 333), (1000,), (77,), (64, 1030)]


def run(make, steps=5, skip=None):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(parameters)
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if (step, number) == skip else grad
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("budget", [33_000, 200_000, 10**9])
@pytest.mark.parametrize("skip", [None, (1, 3)])
def test_paged_is_unpaged_bit_for_bit(budget, skip, tmp_path):
    theirs, plain = run(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True), skip=skip)
    ours, paged = run(lambda p: PagedAdamW(p, lr=0.01, weight_decay=0.1, budget=budget, folder=tmp_path), skip=skip)
    paged.flush()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(paged.state[a][key], plain.state[b][key]), key


def test_never_above_its_budget_and_the_rest_is_there_for_the_next_step(tmp_path):
    _, paged = run(lambda p: PagedAdamW(p, lr=0.01, budget=200_000, folder=tmp_path), steps=1)
    assert (
        150_000 < paged.peak_resident_bytes <= 200_000 < 8 * sum(map(len, (torch.empty(s).flatten() for s in SHAPES)))
    )
    _, after = run(lambda p: PagedAdamW(p, lr=0.01, budget=200_000, folder=tmp_path), steps=3)
    per_step = (after.brought - paged.brought) / 2
    assert per_step < paged.brought  # what was resident at the end of a step is used at the start of the next


def test_a_page_of_many_is_enough_for_all_when_there_is_room(tmp_path):
    _, once = run(lambda p: PagedAdamW(p, lr=0.01, budget=10**9, folder=tmp_path), steps=1)
    _, often = run(lambda p: PagedAdamW(p, lr=0.01, budget=10**9, folder=tmp_path), steps=4)
    assert often.brought == once.brought == len(SHAPES)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_the_kernel_counts_as_resident_of_the_file(tmp_path):
    """After a step, nothing of the mapping but what the last pages left."""
    kept = run(lambda p: PagedAdamW(p, lr=0.01, budget=100_000, folder=tmp_path))
    maps = Path("/proc/self/smaps").read_text()
    sections = re.findall(rf"{re.escape(str(tmp_path))}\S* \(deleted\)\n.*?\nRss: +(\d+) kB", maps, flags=re.DOTALL)
    assert len(sections) == 1
    assert int(sections[0]) * 1024 <= 100_000 < 8 * sum(parameter.numel() for parameter in kept[0])


def test_the_file_has_no_name(tmp_path):
    _, paged = run(lambda p: PagedAdamW(p, lr=0.01, budget=100_000, folder=tmp_path), steps=1)
    assert list(tmp_path.iterdir()) == [] and "offload" in paged.where


def test_too_small_a_budget_and_other_types_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="at least 32768"):
        run(lambda p: PagedAdamW(p, lr=0.01, budget=20_000, folder=tmp_path))
    with pytest.raises(SettingsError, match="float32"):
        PagedAdamW([nn.Parameter(torch.zeros(3).bfloat16())], lr=0.01, budget=10**6)

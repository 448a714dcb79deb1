"""Streams: windows that continue each other, every one a function of its number."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from bildung.core.errors import DataError
from bildung.data.streams import Streams


def test_windows_continue_each_other_and_begin_again_elsewhere() -> None:
    streams = Streams(np.arange(1000, dtype=np.uint16), batch_size=4, window=7, seed=0)
    windows = [streams(n) for n in range(2 * streams.windows)]
    assert [window.first for window in windows[: streams.windows + 1]] == [True, *[False] * (streams.windows - 1), True]
    for before, after in pairwise(windows[: streams.windows]):
        assert torch.equal(before.tokens_BL[:, -1], after.tokens_BL[:, 0])
    for window in windows:
        assert window.tokens_BL.shape == (4, 8) and window.num_targets == 28
        assert torch.equal(window.tokens_BL.diff(dim=1), torch.ones(4, 7, dtype=torch.long))
    assert len({int(streams(epoch * streams.windows).tokens_BL[0, 0]) for epoch in range(20)}) > 3
    assert torch.equal(streams(5).tokens_BL, windows[5].tokens_BL)


def test_every_stream_has_its_own_part_of_the_text() -> None:
    streams = Streams(np.arange(1000), batch_size=4, window=7, seed=0)
    seen = torch.stack([streams(n).tokens_BL[:, :-1] for n in range(streams.windows)])
    assert len(seen.unique()) == seen.numel()


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="less than one window of 30 for each of 4"):
        Streams(np.arange(100), batch_size=4, window=30, seed=0)

"""Exam row 14: bytes and traffic of ZeRO with P parameters on N ranks. (Measured: tests/train/test_parallel.py.)"""

from __future__ import annotations

import pytest

from bildung.train.sharing import OURS, TEXTBOOK, held, parts, sent

# Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1 and table 1: gigabytes for 7.5 billion parameters.
FIGURE = {"ddp": 120.0, "zero1": 31.4, "zero2": 16.6, "zero3": 1.9}
TABLE = {
    1: (120, 120, 120),
    4: (52.5, 41.3, 30),
    16: (35.6, 21.6, 7.5),
    64: (31.4, 16.6, 1.88),
    256: (30.4, 15.4, 0.47),
    1024: (30.1, 15.1, 0.12),
}


@pytest.mark.parametrize("kind", FIGURE)
def test_the_figure_of_the_paper(kind: str) -> None:
    assert held(7.5e9, kind, 64) / 1e9 == pytest.approx(FIGURE[kind], abs=0.05)


@pytest.mark.parametrize("ranks", TABLE)
def test_the_table_of_the_paper(ranks: int) -> None:
    """To half of the last digit that it prints."""
    for kind, gigabytes in zip(("zero1", "zero2", "zero3"), TABLE[ranks], strict=True):
        assert held(7.5e9, kind, ranks) / 1e9 == pytest.approx(gigabytes, abs=0.051 if gigabytes > 2 else 0.006)


def test_the_formulas() -> None:
    P, N = 1000, 8
    assert [held(P, kind, N) for kind in FIGURE] == [16 * P, 4 * P + 12 * P / N, 2 * P + 14 * P / N, 16 * P / N]
    assert held(P, "ddp", N, OURS) == held(P, "ddp", N, TEXTBOOK) and held(P, "zero3", N, OURS) == 16 * P / N
    assert held(P, "zero2", N, OURS) == 4 * P + 12 * P / N, "float32 masters are the weights: half of 16 P is theirs"
    assert parts("zero1", N) == (1, 1, N)


def test_traffic_per_step() -> None:
    P, many = 1e9, 10**6
    assert [round(sent(kind, many, P) / P, 3) for kind in FIGURE] == [2, 2, 2, 3]
    assert sent("ddp", 2, P) == P, "of two ranks each sends half of it twice"
    assert sent("zero3", many, P, micro_batches=4) == pytest.approx(4 * 3 * P, rel=1e-5)
    assert sent("zero2", many, P, micro_batches=4) == pytest.approx(5 * P, rel=1e-5)
    assert sent("zero3", many, 0.01 * P, frozen=0.99 * P) == pytest.approx(2.01 * P, rel=1e-5), (
        "a LoRA's base is gathered"
    )

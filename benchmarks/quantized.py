"""Microseconds of one matrix product over each weight store, forward, and forward with backward.

    python benchmarks/quantized.py [--size 1536 576]

Rows 1 to 16 are decoding, 2048 is training. bfloat16 input; the fastest of many turns, all stores in turn. Ratios are
to the dense bfloat16 matrix. A quantized matrix is dequantized for each product, except that torch's int8 kernel takes
over for few rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from bildung.model.linear import Dense
from bildung.model.quantized import METHODS

TURNS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(1536, 576), metavar=("OUT", "IN"))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    out_features, in_features = given.size
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    stores = {"dense": Dense(torch.nn.Parameter(weight, requires_grad=False))}
    stores |= {name: kind.quantize(weight) for name, kind in METHODS.items()}  # type: ignore[dict-item]
    dequantizing = fastest({name: lambda s=store: s.dense() for name, store in stores.items() if name != "dense"})
    print("dequantizing      " + "  ".join(f"{name} {seconds * 1e6:.0f} µs" for name, seconds in dequantizing.items()))
    for rows in (1, 4, 16, 64, 2048):
        x = torch.randn(rows, in_features).bfloat16()
        with torch.no_grad():
            report(f"{rows:5} rows", fastest({name: lambda s=s, x=x: s(x, None) for name, s in stores.items()}))
    x = x.requires_grad_()

    def both(store: torch.nn.Module) -> None:
        torch.autograd.grad(store(x, None).sum(), x)

    report(" 2048 both ways", fastest({name: lambda s=store: both(s) for name, store in stores.items()}))


def fastest(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, the least of many turns."""
    found = dict.fromkeys(contenders, float("inf"))
    for _ in range(TURNS):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def report(title: str, seconds: dict[str, float]) -> None:
    dense = seconds["dense"]
    parts = [f"{name} {value * 1e6:.0f} µs ({value / dense:.2f} x)" for name, value in seconds.items()]
    print(f"{title:17} " + "  ".join(parts))


if __name__ == "__main__":
    main()

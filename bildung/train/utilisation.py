"""How much of what the device can multiply a training run makes use of: model FLOPs utilisation (Chowdhery et al. 2022,
PaLM, arXiv 2204.02311, appendix B).

    utilisation  =  tokens per second · operations of a trained token / ceiling

    operations   two per multiply-add of the forward pass, term by term (model/count.py); as many for the gradients of
                 the inputs, and as many for those of the matrices that train. What is computed twice to save memory
                 counts once: it brings the model no further
    ceiling      what this device makes of one large matrix product, measured here, in the faster of bfloat16 and
                 float32. A number from a data sheet would promise what no product reaches; and of a CPU none is printed
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch

from bildung.model.base import Model
from bildung.model.count import count, totals

KINDS = ("decoder", "encoder", "recurrent")  # whose batches count the tokens that pass through all of the model
SIZE = {"cpu": 1024, "cuda": 8192}  # rows of the two square matrices


def flops_per_token(model: Any, length: int) -> float:
    """Floating-point operations of training on one token, in rows of `length` tokens: 6 per weight of a dense model
    that trains whole, and what attention adds."""
    _, multiply_adds = totals(count(model, length))
    frozen = 0
    for linear in model.linears().values():
        if not any(parameter.requires_grad for parameter in linear.base.parameters()):
            frozen += linear.in_features * linear.out_features
    return 6 * multiply_adds / length - 2 * frozen


@lru_cache(maxsize=8)
def ceiling(device: str, threads: int) -> float:
    """Floating-point operations per second of a large matrix product on this device, by so many threads."""
    return max(_product_speed(device, dtype) for dtype in (torch.bfloat16, torch.float32))


def _product_speed(device: str, dtype: torch.dtype) -> float:
    size = SIZE[device]
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def full_speed(model: Any, length: int | None, ranks: int = 1) -> float | None:
    """Tokens per second at which `ranks` such devices would do nothing but multiply; None where that is not known: for
    models whose batches do not say how many tokens went through which part."""
    if length is None or not isinstance(model, Model) or model.config.kind not in KINDS:
        return None
    if model.device.type not in SIZE:
        return None
    return ranks * ceiling(model.device.type, torch.get_num_threads()) / flops_per_token(model, length)

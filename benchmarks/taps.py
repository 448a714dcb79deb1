"""What idle taps cost: per call against an identity module, and per forward pass against a model without them.

python -m benchmarks.taps
"""

from __future__ import annotations

import statistics
import timeit

import torch
from torch import Tensor, nn

from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.taps import Taps, observe, sites
from bildung.model.transformer import Decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


class NoTaps(Taps):
    """What a model without the seam would do at a site, as near as Python allows: one call that returns."""

    def __call__(self, site: str, x: Tensor) -> Tensor:
        return x


def ns_per_call(function: object, number: int = 200_000) -> float:
    """Nanoseconds of one call: the best of five."""
    x = torch.zeros(1)
    call = timeit.Timer(lambda: function("layers.0.resid_pre", x), "pass")  # type: ignore[operator]
    empty = timeit.Timer(lambda: x, "pass")
    return (min(call.repeat(5, number)) - min(empty.repeat(5, number))) / number * 1e9


class IdentityHook(nn.Module):
    """The identity module that TransformerLens puts at each site."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def forward_ms(model: Decoder, rounds: int = 15) -> float:
    """Median milliseconds of one forward pass of 128 tokens."""
    tokens = torch.arange(128)[None]
    with torch.inference_mode():
        model(tokens)
        return statistics.median(timeit.repeat(lambda: model(tokens), number=1, repeat=rounds)) * 1e3


def main() -> None:
    """Print the figures."""
    hook = IdentityHook()
    print(f"one idle tap:        {ns_per_call(Taps()):6.0f} ns")
    print(f"one identity module: {ns_per_call(lambda _site, x: hook(x)):6.0f} ns")
    model = build(from_dict(CONFIG)).eval()
    taps, ratios, observed = model.taps, [], []
    for _ in range(7):  # interleaved: a shared machine drifts
        with_taps = forward_ms(model)
        for module in model.modules():
            if "taps" in vars(module):
                module.taps = NoTaps()
        without = forward_ms(model)
        for module in model.modules():
            if "taps" in vars(module):
                module.taps = taps
        with observe(model, "layers.*.resid_post"):
            listening = forward_ms(model)
        ratios.append(with_taps / without)
        observed.append(listening / with_taps)
    count = len(sites(model))
    print(f"forward of 128 tokens with {count} idle sites / without: {statistics.median(ratios):.3f}")
    print(f"the same while every layer's residual stream is read / idle: {statistics.median(observed):.3f}")


if __name__ == "__main__":
    main()

"""The sites of the design, by name and shape, in every family: what a page, a probe or a patch may count on."""

from __future__ import annotations

import pytest

from bildung.model.taps import sites
from tests.contract.test_families import CONFIGS, KINDS, RECURRENT, made

ATTENTION = {
    "q": "B L N H", "k": "B L K H", "v": "B L K H", "scores": "B N L S", "probs": "B N L S", "z": "B L N H",
    "result": "B L N D", "out": "B L D",
}  # fmt: skip
LAYER = {
    "resid_pre": "B L D", **{f"attn.{word}": shape for word, shape in ATTENTION.items()}, "resid_mid": "B L D",
    "mlp.in": "B L D", "mlp.act": "B L F", "mlp.out": "B L D", "resid_post": "B L D",
}  # fmt: skip
CROSS = {f"cross.{word}": shape.replace("B L K H", "B S K H") for word, shape in ATTENTION.items()}


@pytest.mark.parametrize("family", [name for name, kind in KINDS.items() if kind not in RECURRENT])
def test_every_stack_has_every_site(family: str) -> None:
    found, kind = sites(made(family).model), KINDS[family]
    stacks = ["encoder.", "decoder."] if kind == "encoder-decoder" else [""]
    for prefix in stacks:
        layer = LAYER | (CROSS | {"resid_cross": "B L D"} if prefix == "decoder." else {})
        for number in range(2):
            site = f"{prefix}layers.{number}."
            assert {name.removeprefix(site): shape for name, shape in found.items() if name.startswith(site)} == layer
        assert found[f"{prefix}embed"] == ("B P D" if kind == "vision" else "B L D") and f"{prefix}norm" in found
    assert kind == "vision" or found["logits"] == "B L V"


@pytest.mark.parametrize("family", [name for name in CONFIGS if KINDS[name] in RECURRENT])
def test_recurrent_streams_have_the_names_of_the_others(family: str) -> None:
    found, prefix = sites(made(family).model), "decoder." if KINDS[family] == "seq2seq" else ""
    wanted = ["embed", "layers.0.resid_pre", "layers.0.state", "layers.0.resid_post", "norm"]
    assert {f"{prefix}{word}" for word in wanted} | {"logits"} <= set(found)

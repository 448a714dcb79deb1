"""Parts of activations: one syntax for positions and heads, in a forward pass, in padded batches and in generation."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import bildung
from bildung.core.errors import BadIntervention, NoSuchSite
from bildung.model.linear import replace_stores
from bildung.model.quantized import Nf4
from bildung.model.taps import intervene, match_selections, observe, sites
from bildung.run.generate import stream
from bildung.run.loop import decode
from bildung.train.compiled import compile_layers, leave_compiled
from tests.model.test_linear import with_lora
from tests.model.tiny import tiny_decoder, tiny_lm, tokens

EVERY = [
    "*[:, 3|-2]",
    "layers.*.attn.z[:, 5, 2]",
    "layers.*.attn.result[L=4, N=1]",
    "layers.0.attn.probs[:, 2, 5:, :4]",
]


@pytest.mark.parametrize(
    ("chosen", "index"),
    [
        ("layers.0.attn.z[:, 5, 2]", (slice(None), [5], [2])),
        ("layers.0.attn.z[1, -1]", ([1], [10])),
        ("layers.1.attn.probs[:, 2, 3:9:2, 0|4]", (slice(None), [2], slice(3, 9, 2), [0, 4])),
        ("layers.0.attn.probs[S=1, L=7]", (slice(None), slice(None), [7], [1])),
        ("layers.0.mlp.act[:, -3:, 17]", (slice(None), slice(8, None), [17])),
    ],
)
def test_a_selection_is_that_part_of_the_whole(chosen: str, index: Any) -> None:
    model, site = tiny_decoder(), chosen.partition("[")[0]
    with observe(model, [site]) as whole:
        model(tokens())
    with observe(model, chosen) as seen:
        model(tokens())
    expected = whole[site]
    for axis, one in enumerate(index):
        one = one if isinstance(one, slice) else torch.tensor(one)
        expected = expected[(slice(None),) * axis + (one,)]
    assert torch.equal(seen[site], expected)
    changed = whole[site].clone()
    with intervene(model, {chosen: lambda part: part + 1}), observe(model, site) as after:
        model(tokens())
    mask = after[site] != changed
    assert int(mask.sum()) == expected.numel()
    if site.endswith("z"):  # nothing before the place knows of it
        with intervene(model, {chosen: torch.zeros_like}), observe(model, "layers.0.attn.q") as q:
            model(tokens())
        with observe(model, "layers.0.attn.q") as plain:
            model(tokens())
        assert torch.equal(q["layers.0.attn.q"], plain["layers.0.attn.q"])


@pytest.mark.parametrize("variant", ["plain", "tuned", "quantized"])
def test_an_identity_changes_no_bit(variant: str) -> None:
    model = tiny_decoder()
    if variant == "tuned":
        model = with_lora(model)
    if variant == "quantized":
        replace_stores(model, "all", lambda linear: Nf4.quantize(linear.base.dense()))
    plain = model(tokens())
    free = [site for site in sites(model) if not site.endswith((".scores", ".probs", "logits"))]
    chosen = [f"{site}[L=3|-2]" for site in free] + EVERY[1:3]
    with intervene(model, dict.fromkeys(chosen, lambda x: x.clone())):
        assert torch.equal(model(tokens()), plain)
    with observe(model, "layers.0.attn.probs"):
        explicit = model(tokens())
    with intervene(model, {EVERY[3]: lambda x: x.clone()}):
        assert torch.equal(model(tokens()), explicit)


def test_results_of_the_heads_sum_to_the_output_and_one_head_can_be_removed_by_them() -> None:
    model = with_lora(tiny_decoder(attention_bias=True))
    for linear in model.linears().values():
        if linear.bias is not None:
            linear.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    with observe(model, ["layers.*.attn.result", "layers.*.attn.out"]) as seen:
        watched = model(tokens())
    assert torch.equal(watched, model(tokens()))
    bias = model.model.layers[1].self_attn.o_proj.bias
    total = seen["layers.1.attn.result"].sum(2) + (0 if bias is None else bias)
    torch.testing.assert_close(total, seen["layers.1.attn.out"], atol=1e-4, rtol=1e-4)
    with intervene(model, {"layers.1.attn.z[:, :, 4]": torch.zeros_like}):
        by_z = model(tokens())
    with intervene(model, {"layers.1.attn.result[:, :, 4]": torch.zeros_like}):
        torch.testing.assert_close(model(tokens()), by_z, atol=1e-4, rtol=1e-4)
    assert (by_z - watched).abs().max() > 0.01


def test_positions_are_absolute_while_a_cache_generates() -> None:
    model = tiny_decoder()
    prompt = tokens(1, 6)[0].tolist()
    push = {"layers.0.resid_post[:, 4|7]": lambda x: x + 2, "layers.1.resid_pre[:, -1]": lambda x: 2 * x}
    plain = decode(model, [prompt], new_tokens=5)[0].tokens
    with intervene(model, push):
        cached = decode(model, [prompt], new_tokens=5)[0]
    with intervene(model, push):
        again = decode(model, [prompt], new_tokens=5, use_cache=False)[0]
    assert cached.tokens == again.tokens != plain
    torch.testing.assert_close(torch.tensor(cached.log_probs), torch.tensor(again.log_probs), atol=1e-4, rtol=1e-4)
    whole = torch.tensor([prompt + plain[:-1]])
    with observe(model, ["layers.1.resid_post[:, :]", "layers.0.attn.z[:, -2:8, 3]"]) as seen:
        decode(model, [prompt], new_tokens=5)
    with observe(model, ["layers.1.resid_post", "layers.0.attn.z"]) as expected:
        model(whole)
    torch.testing.assert_close(seen["layers.1.resid_post"], expected["layers.1.resid_post"], atol=1e-4, rtol=1e-4)
    chosen = expected["layers.0.attn.z"][:, 4:8, [3]]
    torch.testing.assert_close(seen["layers.0.attn.z"], chosen, atol=1e-4, rtol=1e-4)


def test_padded_rows_count_their_own_tokens() -> None:
    """The same edit by position, alone and in a batch that is padded on the left."""
    model = tiny_decoder()
    rows = [tokens(1, 9, seed=4)[0].tolist(), tokens(1, 5, seed=5)[0].tolist()]
    edit = {"layers.0.resid_post[:, 2|6|-1]": lambda x: x + 1.5}
    with intervene(model, edit):
        together = decode(model, rows, new_tokens=4)
    for row, answer in zip(rows, together, strict=True):
        with intervene(model, edit):
            alone = decode(model, [row], new_tokens=4)[0]
        assert alone.tokens == answer.tokens
        torch.testing.assert_close(torch.tensor(alone.log_probs), torch.tensor(answer.log_probs), atol=1e-4, rtol=1e-4)
    keep = torch.tensor([[True] * 11, [True] * 8 + [False] * 3])
    with observe(model, ["embed[:, -1]", "embed"][:1]) as seen:
        model(tokens(), keep_BL=keep)
    assert torch.equal(seen["embed"][:, 0], model.model.embed_tokens(tokens()[[0, 1], [10, 7]]))


def test_generating_text_obeys_a_selection() -> None:
    lm = tiny_lm()
    plain = bildung.generate(lm, "abc", new_tokens=6)
    with intervene(lm.model, {"layers.1.resid_post[:, -1:]": lambda x: x * 0 + 1}):
        assert bildung.generate(lm, "abc", new_tokens=6) != plain
    ids, written = lm.tokenizer.encode("abc"), []
    with intervene(lm.model, {"logits[:, 5]": lambda x: x.index_fill(-1, torch.tensor(65), 1e4)}):
        list(stream(lm, ids, 6, generated=written))
    assert len(ids) < 6 and [*ids, *written][6] == 65


def test_gradients_at_sites_of_a_frozen_model() -> None:
    model = tiny_decoder().requires_grad_(False)
    with observe(model, ["layers.0.resid_post", "layers.1.attn.z[:, 5, 2]"], gradients=True) as seen:
        model(tokens())[:, -1].logsumexp(-1).sum().backward()
    assert seen.gradients["layers.1.attn.z"].shape == (2, 1, 1, 64)
    h = seen["layers.0.resid_post"].detach()
    step = 1e-2 * torch.randn(h.shape, generator=torch.Generator().manual_seed(0))

    def at(x: Tensor) -> Tensor:
        with intervene(model, {"layers.0.resid_post": lambda _: x}):
            return model(tokens())[:, -1].double().logsumexp(-1).sum()

    slope = (at(h + step) - at(h - step)) / 2
    assert slope == pytest.approx((seen.gradients["layers.0.resid_post"] * step).sum().item(), rel=0.02)
    refused = pytest.raises(BadIntervention, match=r"leave torch\.no_grad")
    with refused, torch.no_grad(), observe(model, "embed", gradients=True):
        model(tokens())


NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++, which is not there")


ITS_OWN_WARNING = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning", "ignore:.torch.jit.script_method. is dep:DeprecationWarning"
)


@ITS_OWN_WARNING
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=NO_COMPILER)])
def test_an_identity_changes_no_bit_of_compiled_layers(backend: str) -> None:
    model = tiny_decoder(num_hidden_layers=1)
    compile_layers(model, backend)
    chosen = ["layers.*.resid_mid", "layers.*.mlp.out[:, 3]", "layers.*.attn.z[:, -1, 2]", "layers.*.attn.result"]
    plain = model(tokens())
    with intervene(model, dict.fromkeys(chosen, lambda x: x.clone())):
        assert torch.equal(model(tokens()), plain)
    with intervene(model, {chosen[2]: torch.zeros_like}):
        changed = model(tokens())
    assert torch.equal(changed[:, :-1], plain[:, :-1]) and not torch.equal(changed[:, -1], plain[:, -1])
    leave_compiled(model)
    with intervene(model, {chosen[2]: torch.zeros_like}):
        torch.testing.assert_close(model(tokens()), changed, atol=1e-5, rtol=1e-5)


def test_every_site_has_a_gradient_and_looking_changes_no_other() -> None:
    model = with_lora(tiny_decoder(attention_bias=True)).eval()
    every = [site for site in sites(model) if ".scores" not in site and ".probs" not in site]  # their path rounds anew
    found = []
    for looked_at in (["embed"], every):
        model.zero_grad()
        with observe(model, looked_at, gradients=True) as seen:
            model(tokens())[:, -1].square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert set(seen.gradients) == set(every) and all(gradient.any() for gradient in seen.gradients.values())
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-4)
    gradient = seen.gradients["layers.1.attn.result"]  # a sum passes its gradient on to all its parts
    assert torch.equal(gradient, seen.gradients["layers.1.attn.out"][:, :, None].expand_as(gradient))


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ("layers.0.attn.z[:, five]", "'five' is no index"),
        ("layers.0.attn.z[:, 1, 2, 3, 4]", "5 indices .* B L N H"),
        ("layers.0.resid_post[N=2]", "shape B L D, without N"),
        ("layers.0.resid_post[head=2]", "'head' is no letter"),
        ("layers.0.attn.zed[:, 5]", "did you mean.*attn.z"),
        ("layers.0.attn.z[L=1, L=2]", "two indices for L"),
        ("layers.0.resid_post[::0, 1]", "'::0' is no index"),
        ("layers.0.resid_post[L=3, 1]", "follows an index with a letter"),
    ],
)
def test_what_is_no_selection_is_refused_before_anything_runs(chosen: str, says: str) -> None:
    with pytest.raises(NoSuchSite, match=says):
        match_selections(tiny_decoder(), chosen)


def test_positions_and_heads_that_are_not_there_are_refused() -> None:
    model = tiny_decoder()
    assert len(match_selections(model, "layers.*.attn.[qk]")) == 4  # a shell pattern is one still
    for use in (lambda site: observe(model, site), lambda site: intervene(model, {site: torch.zeros_like})):
        with (
            pytest.raises(NoSuchSite, match="was never read; the last pass ended with position 10"),
            use("embed[:, 40]"),
        ):
            model(tokens())
        with pytest.raises(NoSuchSite, match="head 6 is not there; there are 0 to 5"), use("layers.0.attn.z[:, 1, 6]"):
            model(tokens())
        with pytest.raises(NoSuchSite, match="position -12 lies before the prompt"), use("embed[:, -12]"):
            model(tokens())
    with pytest.raises(BadIntervention, match=r"z\[:, 5\] returned"), intervene(model, {"*.z[:, 5]": lambda x: x[0]}):
        model(tokens())
    keep = torch.tensor([[True] * 11, [True] * 4 + [False] * 7])
    with pytest.raises(BadIntervention, match="other numbers of these positions"), observe(model, "embed[:, 3:]"):
        model(tokens(), keep_BL=keep)


def test_the_gradient_of_a_loss_flows_through_a_changed_part() -> None:
    model = tiny_decoder()
    shift = torch.zeros(192, requires_grad=True)
    with intervene(model, {"layers.0.resid_post[:, 4:6]": lambda x: x + shift}):
        model(tokens()).logsumexp(-1).sum().backward()
    assert shift.grad is not None and shift.grad.abs().sum() > 0

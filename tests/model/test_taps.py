"""The activation seam: names, shapes, reading, writing, attaching, and torch.compile."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bildung.core.errors import BadIntervention, NoSuchSite
from bildung.model.linear import replace_stores
from bildung.model.quantized import Nf4
from bildung.model.taps import Attachment, attach, detach, intervene, match_sites, observe, sites
from bildung.model.transformer import Decoder
from tests.model.test_linear import with_lora
from tests.model.tiny import tiny_decoder, tiny_lm, tokens

SIZES = {"B": 2, "L": 11, "S": 11, "D": 192, "N": 6, "K": 2, "H": 64, "F": 320, "V": 101}


def quantized(model: Decoder) -> Decoder:
    replace_stores(model, "all", lambda linear: Nf4.quantize(linear.base.dense()))
    return model


VARIANTS = {"plain": lambda m: m, "tuned": with_lora, "quantized": quantized, "both": lambda m: with_lora(quantized(m))}


class Scale(Attachment):
    """x * (1 + s): the identity at first."""

    def __init__(self, start: float = 0.0):
        super().__init__()
        self.settings = {"start": start}
        self.scale = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.scale)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_site_fires_with_its_documented_shape(variant: str) -> None:
    model = VARIANTS[variant](tiny_decoder())
    with observe(model, "*") as seen:
        logits = model(tokens())
    assert list(seen) == list(sites(model)) or set(seen) == set(sites(model))
    for site, shape in sites(model).items():
        assert tuple(seen[site].shape) == tuple(SIZES[letter] for letter in shape.split()), site
    assert torch.equal(seen["logits"], logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_patching_with_ones_own_activations_changes_nothing_bit_for_bit(variant: str) -> None:
    model = VARIANTS[variant](tiny_decoder())
    pattern = [site for site in sites(model) if not site.endswith((".scores", ".probs"))]
    plain = model(tokens())
    with observe(model, pattern) as seen:
        model(tokens())
    with intervene(model, {site: lambda _x, value=value: value for site, value in seen.items()}):
        assert torch.equal(model(tokens()), plain)


def test_explicit_attention_agrees_with_the_kernel_and_is_itself_patchable() -> None:
    model = tiny_decoder()
    plain = model(tokens())
    with observe(model, ["*.attn.scores", "*.attn.probs"]) as seen:
        explicit = model(tokens())
    torch.testing.assert_close(explicit, plain, atol=1e-5, rtol=1e-5)
    probs = seen["layers.0.attn.probs"]
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 6, 11))
    assert (probs.triu(1) == 0).all()
    with intervene(model, {site: lambda _x, value=value: value for site, value in seen.items()}):
        assert torch.equal(model(tokens()), explicit)


def test_residual_stream_is_the_sum_of_its_parts() -> None:
    model = tiny_decoder()
    with observe(model, "*") as seen:
        model(tokens())
    parts = [seen[f"layers.{i}.{word}.out"] for i in range(2) for word in ("attn", "mlp")]
    torch.testing.assert_close(seen["embed"] + sum(parts), seen["layers.1.resid_post"], atol=1e-5, rtol=1e-5)
    assert torch.equal(seen["layers.0.resid_post"], seen["layers.1.resid_pre"])


def test_patching_the_residual_stream_everywhere_transplants_the_other_run() -> None:
    model = tiny_decoder()
    other = tokens(seed=9)
    with observe(model, "layers.0.resid_post") as seen:
        wanted = model(other)
    with intervene(model, {"layers.0.resid_post": lambda _: seen["layers.0.resid_post"]}):
        assert torch.equal(model(tokens()), wanted)


def test_interventions_stack_in_order_and_end_with_their_block() -> None:
    model = tiny_decoder()
    plain = model(tokens())
    site = "layers.1.mlp.out"
    with intervene(model, {site: torch.zeros_like}):
        ablated = model(tokens())
        with observe(model, site) as seen:
            model(tokens())
        assert (seen[site] == 0).all()
    assert not torch.equal(ablated, plain)
    assert torch.equal(model(tokens()), plain)
    twice = {"layers.*.mlp.out": lambda x: x + 1, site: lambda x: 3 * x}
    with intervene(model, twice), observe(model, site) as seen:
        model(tokens())
    with intervene(model, {"layers.0.mlp.out": lambda x: x + 1}), observe(model, site) as once:
        model(tokens())
    torch.testing.assert_close(seen[site], 3 * (once[site] + 1))
    with pytest.raises(RuntimeError, match="stop"), intervene(model, {site: torch.zeros_like}):
        raise RuntimeError("stop")
    assert not model.taps.listeners


def test_two_models_do_not_hear_each_other() -> None:
    model = tiny_decoder()
    twin = copy.deepcopy(model)
    with intervene(model, {"embed": torch.zeros_like}):
        assert not torch.equal(model(tokens()), twin(tokens()))


def test_gradients_reach_a_site() -> None:
    model = tiny_decoder()
    with observe(model, "layers.0.resid_post") as seen:
        loss = model(tokens()).logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(loss, seen["layers.0.resid_post"])
    assert gradient.abs().sum() > 0


def test_unknown_sites_and_bad_shapes_are_refused() -> None:
    model = tiny_decoder()
    with pytest.raises(NoSuchSite, match=r"layers 0\.\.1"), observe(model, "layers.7.resid_post"):
        pass
    with pytest.raises(NoSuchSite, match="resid_post"):
        match_sites(model, ["embed", "layers.0.resid_pots"])
    with (
        intervene(model, {"embed": lambda x: 0.0}),
        pytest.raises(BadIntervention, match=r"returned 0\.0, of type float"),
    ):
        model(tokens())
    with intervene(model, {"embed": lambda x: x[:, :3]}), pytest.raises(BadIntervention, match="must keep the shape"):
        model(tokens())


def test_attached_modules_train_and_can_be_removed() -> None:
    model = tiny_decoder().requires_grad_(False)
    plain = model(tokens())
    made = attach(model, "layers.*.mlp.out", Scale())
    assert list(made) == ["layers.0.mlp.out", "layers.1.mlp.out"]
    assert made["layers.0.mlp.out"] is not made["layers.1.mlp.out"]
    assert torch.equal(model(tokens()), plain)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["attached.layers/0/mlp/out.scale", "attached.layers/1/mlp/out.scale"]
    model(tokens()).logsumexp(-1).sum().backward()
    assert all(module.scale.grad.abs() > 0 for module in made.values())
    made["layers.0.mlp.out"].scale.data.fill_(0.5)
    assert not torch.equal(model(tokens()), plain)
    with pytest.raises(BadIntervention, match="already carries"):
        attach(model, "layers.0.mlp.out", Scale())
    copied = copy.deepcopy(model)
    copied.attached["layers/0/mlp/out"].scale.data.fill_(0.0)
    assert torch.equal(copied(tokens()), plain) and not torch.equal(model(tokens()), plain)
    detach(model, "layers.*.mlp.out")
    assert torch.equal(model(tokens()), plain)


class Difference(Attachment):
    """Adds to the last stream how far it is from the first."""

    reads = ("embed",)

    def __init__(self) -> None:
        super().__init__()
        self.settings = {}

    def see(self, site: str, x: Tensor) -> None:
        self.first = x

    def forward(self, x: Tensor) -> Tensor:
        first = self.__dict__.pop("first")  # kept no longer than a forward pass: it holds its graph
        return x + (x - first)


def test_an_attachment_is_shown_the_other_sites_it_reads() -> None:
    model = tiny_decoder()
    with observe(model, ["embed", "norm"]) as seen:
        plain = model(tokens())
    expected = model.unembed(seen["norm"] + (seen["norm"] - seen["embed"]))
    attach(model, "norm", Difference())
    assert torch.equal(model(tokens()), expected)
    assert torch.equal(copy.deepcopy(model)(tokens()), expected)
    detach(model, "norm")
    assert not model.taps.listeners and torch.equal(model(tokens()), plain)


NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++, which is not there")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, inside inductor
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=NO_COMPILER)])
def test_taps_are_honoured_under_torch_compile(backend: str) -> None:
    """A forward hook added after compiling is ignored by torch 2.13; a tap must not be."""
    model = tiny_decoder(num_hidden_layers=1)
    plain = model(tokens())
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens()), plain, atol=1e-5, rtol=1e-5)
        with intervene(model, {"layers.0.resid_mid": torch.zeros_like}):
            ablated = model(tokens())
            torch.testing.assert_close(compiled(tokens()), ablated, atol=1e-5, rtol=1e-5)
        assert (ablated - plain).abs().max() > 0.1
        with observe(model, "layers.0.attn.z") as seen:
            compiled(tokens())
        assert seen["layers.0.attn.z"].shape == (2, 11, 6, 64)
        torch.testing.assert_close(compiled(tokens()), plain, atol=1e-5, rtol=1e-5)


def test_what_is_no_model_is_refused_with_the_way_to_one() -> None:
    lm = tiny_lm()
    for use in (
        lambda: sites(lm),  # type: ignore[arg-type]
        lambda: observe(lm, "embed").__enter__(),  # type: ignore[arg-type]
        lambda: intervene(lm, {"embed": lambda x: x}).__enter__(),  # type: ignore[arg-type]
        lambda: attach(lm, "embed", Scale()),  # type: ignore[arg-type]
        lambda: detach(lm, "embed"),  # type: ignore[arg-type]
    ):
        with pytest.raises(NoSuchSite, match=r"a LanguageModel has no activation sites, a model has; give its \.model"):
            use()
    with pytest.raises(NoSuchSite, match="a str has no activation sites"):
        sites("lives/base")  # type: ignore[arg-type]

"""Attention by blocks of queries: the kernel's numbers and gradients, under every kind of mask, and less computed."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.model import attention
from bildung.model.attention import Mask, make_mask
from bildung.model.attention_blocks import QUERIES, attend, blocks_of, products_in
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.transformer import Decoder

B, L, N, K, H = 2, 300, 4, 2, 8


def documents(*lengths: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def masks() -> dict[str, Mask]:
    segments = torch.cat((documents(40, 7, 200, 53), documents(1, 299)))
    keep = torch.ones(B, L, dtype=torch.bool)
    keep[0, 150:] = False
    keep[1, :9] = False
    device = torch.device("cpu")
    prefix = torch.arange(L).expand(B, L) < 20
    return {
        "causal": Mask(None, causal=True),
        "all": Mask(None, causal=False),
        "documents": make_mask(L, 0, None, None, segments, device),
        "padding": make_mask(L, 0, None, keep, None, device),
        "padding, both ways": make_mask(L, 0, None, keep, None, device, causal=False),
        "window": make_mask(L, 0, 50, None, None, device),
        "prefix": make_mask(L, 0, None, None, None, device, prefix_BS=prefix),
    }


def inputs(dtype: torch.dtype = torch.float32, length: int = L, total: int = L) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, length, N, H), (B, total, K, H), (B, total, K, H))
    made = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]
    return [one.requires_grad_() for one in made]


def results(f, given: list[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    z = f(*given)
    dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z.dtype)
    return (z, *torch.autograd.grad(z, given, dz))


def by_kernel(mask: Mask):  # type: ignore[no-untyped-def]
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.allowed_B1LS, is_causal=mask.causal, scale=0.3, enable_gqa=True
    )


def by_blocks(mask: Mask):  # type: ignore[no-untyped-def]
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = mask.cut(torch.empty(q.shape[0], q.shape[2], 1), k.shape[2]).blocks
        assert blocks is not None
        return attend(q, k, v, 0.3, blocks)

    return f


@pytest.mark.parametrize("name", masks())
def test_numbers_and_gradients_are_the_kernels(name: str) -> None:
    mask = masks()[name]
    for ours, theirs in zip(results(by_blocks(mask), inputs()), results(by_kernel(mask), inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["causal", "documents"])
def test_in_bfloat16_it_is_nearer_to_the_truth_than_the_kernel(name: str) -> None:
    mask, given = masks()[name], inputs(torch.bfloat16)
    truth = results(by_kernel(mask), [one.detach().double().requires_grad_() for one in given])
    for ours, theirs, true in zip(results(by_blocks(mask), given), results(by_kernel(mask), given), truth, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - true).abs().mean() <= (theirs - true).abs().mean()


def test_more_keys_than_queries() -> None:
    """As after a cache: the mask says who is where."""
    mask = make_mask(L, 60, None, None, None, torch.device("cpu"))
    given = inputs(length=L, total=L + 60)
    for ours, theirs in zip(results(by_blocks(mask), given), results(by_kernel(mask), given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def computed(mask: Mask) -> int:
    """Scores per head."""
    blocks = mask.cut(torch.empty(B, L, 1), L).blocks
    assert blocks is not None
    return sum((end - start) * (last - first) for _, start, end, first, last, *_ in blocks.table.tolist())


def test_what_is_forbidden_as_a_whole_is_not_computed() -> None:
    made = {name: computed(mask) for name, mask in masks().items()}
    assert made["all"] == B * L * L
    # blocks of 128, 128 and 44 queries end their keys with themselves
    assert made["causal"] == B * (128 * 128 + 128 * 256 + 44 * 300)
    # those of the first row begin with documents 1, 3 and 4 (at 0, 47, 247), of the second with 1, 2 and 2
    assert made["documents"] == 128 * 128 + 128 * 209 + 44 * 53 + 128 * 128 + 128 * 255 + 44 * 299
    assert made["window"] < made["causal"]


def small_model() -> Decoder:
    keys = dict(model_type="llama", vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    keys |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=L, initializer_range=0.2)
    keys |= dict(rms_norm_eps=1e-5, tie_word_embeddings=False)
    return build(from_dict(keys))


def test_a_model_takes_it_for_long_rows_and_gives_what_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    tokens = torch.randint(0, 61, (2, L))
    segments = torch.cat((documents(40, 7, 200, 53), documents(1, 299)))
    calls: list[int] = []

    def counting(*given):  # type: ignore[no-untyped-def]
        calls.append(len(given[4].table))
        return attend(*given)

    monkeypatch.setattr(attention, "attend", counting)
    with torch.no_grad():
        long, packed = model(tokens), model(tokens, segments_BL=segments)
        cache = model.kv_cache(2, L)
        cached = torch.cat((model(tokens[:, :130], kv_cache=cache), model(tokens[:, 130:], kv_cache=cache)), dim=1)
    assert calls == [2 * math.ceil(L / QUERIES)] * 4 + [2 * 2] * 4
    model(tokens[:, : QUERIES - 1])
    assert len(calls) == 8
    monkeypatch.setattr(attention, "QUERIES", L + 1)
    with torch.no_grad():
        torch.testing.assert_close(long, model(tokens), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed, model(tokens, segments_BL=segments), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cached, long, atol=1e-5, rtol=1e-5)


def test_training_and_reading_give_the_same_bits() -> None:
    mask, given = masks()["documents"], inputs(torch.bfloat16)
    with torch.no_grad():
        read = by_blocks(mask)(*given)
    assert torch.equal(read, by_blocks(mask)(*given))


def test_it_keeps_q_k_and_v_only() -> None:
    given, kept = inputs(), set[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        z = by_blocks(masks()["causal"])(*given)
    own = {one.untyped_storage().data_ptr() for one in given}
    assert own < kept and len(kept) == 6 and z.requires_grad  # and the seed; and the blocks, which all layers share


def test_products_in_bfloat16_lose_nothing_of_bfloat16_factors_and_leave_the_setting_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    a, b = torch.randn(3, 40, 16).bfloat16().float(), torch.randn(3, 16, 50).bfloat16().float()
    with pytest.raises(ZeroDivisionError), products_in(torch.bfloat16):
        torch.testing.assert_close(torch.bmm(a, b), (a.double() @ b.double()).float(), atol=1e-5, rtol=1e-5)
        1 / 0  # noqa: B018
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_blocks_are_made_once_for_all_layers_and_only_where_they_are_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = small_model(), []
    monkeypatch.setattr(attention, "blocks_of", lambda *given: made.append(given) or blocks_of(*given))
    model(torch.randint(0, 61, (2, L)))
    assert len(made) == 1
    model(torch.randint(0, 61, (2, QUERIES - 1)))
    assert len(made) == 1
    biased = Mask(None, causal=True).with_bias(torch.zeros(1, N, L, L))
    assert biased.cut(torch.empty(B, L, 1), L).blocks is None


def test_dropout_hits_its_share_of_the_probabilities_and_the_gradient_knows_which() -> None:
    """Values that are an identity matrix show the probabilities themselves: so many are 0, the others are scaled up."""
    mask = make_mask(150, 0, None, None, documents(40, 110), torch.device("cpu"))
    blocks = blocks_of(mask.allowed_B1LS, mask.causal, 1, 150, 150)
    q, k = (torch.randn(1, 1, 150, 150, dtype=torch.float64).requires_grad_() for _ in range(2))
    eye = torch.eye(150, dtype=torch.float64)[None, None].requires_grad_()
    plain, dropped = (attend(q, k, eye, 0.05, blocks, dropout) for dropout in (0.0, 0.4))
    kept = dropped[plain > 0] / plain[plain > 0]
    torch.testing.assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / 0.6), rtol=1e-4, atol=0)
    assert (kept > 0).double().mean() == pytest.approx(0.6, abs=0.02)
    factors = torch.where(plain > 0, dropped / plain, 0.0).detach()
    assert not torch.equal(attend(q, k, eye, 0.05, blocks, 0.4), dropped)

    def openly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) * 0.05).masked_fill(~mask.allowed_B1LS, -math.inf)
        return (scores.softmax(-1) * factors) @ v

    dz = torch.randn(1, 1, 150, 150, dtype=torch.float64)
    for found, wanted in zip(
        torch.autograd.grad(dropped, (q, k, eye), dz),
        torch.autograd.grad(openly(q, k, eye), (q, k, eye), dz),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_the_operators_are_what_they_say() -> None:
    """Shapes without numbers, gradients, no input changed: what compilers rely on."""
    mask = masks()["documents"].cut(torch.empty(B, L, 1), L)
    assert mask.blocks is not None
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.2):
            seed = torch.tensor([5])
            given = (*inputs(dtype), 0.3, mask.blocks.table, mask.blocks.bias, dropout, seed)
            torch.library.opcheck(torch.ops.bildung.attend.default, given)


def test_compiled() -> None:
    mask = masks()["documents"]
    blocks = mask.cut(torch.empty(B, L, 1), L).blocks
    assert blocks is not None
    run = torch.compile(lambda q, k, v: attend(q, k, v, 0.3, blocks), backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(results(run, inputs()), results(by_blocks(mask), inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_calling_it_imports_no_compiler() -> None:
    """That would be 80 MB of every process that reads padded texts."""
    code = (
        "import sys, torch; from tests.model.test_attention_blocks import attend, inputs, masks, B, L\n"
        "blocks = masks()['documents'].cut(torch.empty(B, L, 1), L).blocks\n"
        "known = set(sys.modules)\n"
        "attend(*inputs(), 0.3, blocks)\n"
        "assert not [name for name in set(sys.modules) - known if name.startswith(('torch._dynamo', 'sympy'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""The chunked loss equals plain cross-entropy, gradients included, and never builds all logits."""

from __future__ import annotations

import contextlib
import math
import weakref

import pytest
import torch
import torch.nn.functional as F

from bildung.data.batches import Example, pad, pad_packed
from bildung.model.low_rank import LowRank
from bildung.train import objectives, vocabulary
from bildung.train.objectives import clm, surprisal, surprisal_sum, token_logprobs


@pytest.fixture(params=["one chunk", "chunks of three rows"])
def chunks(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setitem(objectives.CHUNK_ELEMENTS, "cpu", 3 * 61)


def plain_nll(model, batch):
    """Per-token cross-entropy of F.cross_entropy on all logits, 0 where a token is no target."""
    logits_BLV = model(batch.tokens_BL, keep_BL=batch.keep_BL, segments_BL=batch.segments_BL)
    nll_BL = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), batch.tokens_BL[:, 1:].flatten(), reduction="none")
    return nll_BL.view(batch.tokens_BL.shape[0], -1) * batch.loss_mask_BL[:, 1:]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
def test_sum_and_gradients_equal_plain_cross_entropy(make_model, batch_at, chunks, tied):
    model, batch = make_model(tied), batch_at(0)
    loss = clm(model, batch)
    assert loss.count == batch.num_targets
    plain = plain_nll(model, batch).sum()
    torch.testing.assert_close(loss.total, plain, rtol=1e-6, atol=1e-5)
    ours, theirs = gradients(model, loss.total / loss.count), gradients(model, plain / loss.count)
    assert ours.keys() == theirs.keys() and "model.embed_tokens.weight" in ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_row_sums_take_any_weights(make_model, batch_at, chunks):
    """DPO weighs rows: the slope computed in the forward pass must scale with weights known only later."""
    model, batch = make_model(), batch_at(1)
    weights_B = torch.tensor([0.5, -2.0, 0.0, 3.0])
    sums_B = token_logprobs(model, batch)
    plain_B = -plain_nll(model, batch).sum(1)
    torch.testing.assert_close(sums_B, plain_B, rtol=1e-6, atol=1e-5)
    ours = gradients(model, (weights_B * sums_B).sum())
    theirs = gradients(model, (weights_B * plain_B).sum())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=name)


def test_without_gradients_the_numbers_are_the_same(make_model, batch_at, chunks):
    model, batch = make_model(), batch_at(2)
    with torch.no_grad():
        sums_B = token_logprobs(model, batch)
    assert not sums_B.requires_grad
    torch.testing.assert_close(sums_B, token_logprobs(model, batch).detach())


@pytest.mark.parametrize("trained", [True, False])
def test_logits_exist_for_targets_only_and_a_chunk_at_a_time(make_model, batch_at, monkeypatch, trained):
    """Two chunks where the unembedding trains; in float32 one in any case. Those before are gone by then."""
    monkeypatch.setitem(objectives.CHUNK_ELEMENTS, "cpu", 3 * 61)
    model, batch, wide = make_model(), batch_at(0), []
    model.lm_head.requires_grad_(trained)
    nll_and_slope = vocabulary.nll_and_slope
    monkeypatch.setattr(vocabulary, "nll_and_slope", lambda *given: wide.append(len(given[0])) or nll_and_slope(*given))
    rows, made, unembed = [], [], model.unembed

    def watched(h_CD):
        assert not any(before() is not None for before in made)
        rows.append(len(h_CD))
        logits_CV = unembed(h_CD)
        made.append(weakref.ref(logits_CV))
        return logits_CV

    monkeypatch.setattr(model, "unembed", watched)
    clm(model, batch)
    assert len(made) > 1
    assert max(rows) == (6 if trained else 3) and sum(rows) == batch.num_targets < batch.num_tokens
    assert max(wide) == 3 and sum(wide) == batch.num_targets


def test_a_delta_on_the_unembedding_trains_and_its_dropout_is_the_same_twice(make_model, chunks):
    """The backward pass unembeds again; with another dropout mask the gradient would be of another function."""
    model = make_model().requires_grad_(False)
    delta = LowRank(24, 61, 2, 1.0, dropout=0.5)
    torch.nn.init.normal_(delta.lora_B)
    model.lm_head.deltas["default"] = delta
    model.train()
    h_ND, targets_N = torch.randn(7, 24), torch.arange(7)

    def value() -> torch.Tensor:
        torch.manual_seed(3)
        return surprisal(model, h_ND, targets_N).sum()

    value().backward()
    found, step = delta.lora_A.grad[1, 5].item(), 1e-2
    with torch.no_grad():
        delta.lora_A[1, 5] += step
        above = value()
        delta.lora_A[1, 5] -= 2 * step
        below = value()
    assert found == pytest.approx(((above - below) / (2 * step)).item(), rel=2e-2)
    assert abs(found) > 1e-2


def test_padding_changes_nothing_and_packed_equals_padded(make_model):
    model = make_model()
    examples = [Example(list(range(3, 3 + n)), [False] + [True] * (n - 1)) for n in (4, 9, 6)]
    alone = sum(clm(model, pad([example], 0)).total for example in examples)
    padded, packed = clm(model, pad(examples, 0)), clm(model, pad_packed([examples[:2], examples[2:]], 0))
    assert padded.count == packed.count == 3 + 8 + 5
    torch.testing.assert_close(padded.total, alone, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(packed.total, alone, rtol=1e-6, atol=1e-5)


def test_padding_on_the_left_is_masked(make_model):
    """Batches of this package pad on the right and need no mask; others must still be right."""
    model = make_model()
    right = pad(
        [Example([5, 6, 7, 8], [False, True, True, True]), Example(list(range(9, 17)), [False] + [True] * 7)], 0
    )
    rolled = [t.clone() for t in (right.tokens_BL, right.loss_mask_BL, right.keep_BL, right.positions_BL)]
    for t in rolled:
        t[0] = t[0].roll(4)
    left = type(right)(*rolled)
    torch.testing.assert_close(clm(model, left).total, clm(model, right).total, rtol=1e-6, atol=1e-5)


def test_the_exams_cross_entropies(make_model):
    """p = (.1, .7, .2): -log p is 1.6094 nats for the third word, 0.3567 for the second."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.base.weight.fill_(-100.0)
        model.lm_head.base.weight[:3] = torch.tensor([0.1, 0.7, 0.2]).log()[:, None] / 24
    nll = surprisal(model, torch.ones(2, 24), torch.tensor([2, 1]))
    assert nll.tolist() == pytest.approx([1.6094, 0.3567], abs=1e-4)
    assert nll.sum().item() == pytest.approx(-math.log(0.2 * 0.7), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
@pytest.mark.parametrize("tied", [False, True])
def test_label_smoothing_is_that_of_torch(make_model, batch_at, chunks, smoothing, tied):
    """(1 - eps) one-hot + eps uniform over the vocabulary, in nats; value and gradients."""
    model, batch = make_model(tied), batch_at(0)
    loss = clm(model, batch, smoothing)
    is_target = batch.loss_mask_BL[:, 1:]
    logits = model(batch.tokens_BL, keep_BL=batch.keep_BL)[:, :-1][is_target]
    targets = batch.tokens_BL[:, 1:][is_target]
    plain = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss.total, plain, rtol=1e-6, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(clm(model, batch, smoothing).total, loss.total.detach())
    ours, theirs = gradients(model, loss.total / loss.count), gradients(model, plain / loss.count)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_smoothed_loss_is_least_at_the_smoothed_distribution(make_model):
    """Its minimum over all p is the entropy of (1 - eps) one-hot + eps / V, not 0."""
    V, eps = 61, 0.1
    best = math.log((1 - eps) + eps / V), math.log(eps / V)
    logits = torch.full((1, V), best[1])
    logits[0, 7] = best[0]
    found, slope = vocabulary.nll_and_slope(logits, torch.tensor([7]), eps)
    assert float(found) == pytest.approx(
        -(math.exp(best[0]) * best[0] + (V - 1) * math.exp(best[1]) * best[1]), rel=1e-5
    )
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_one_exponential_is_as_exact_as_two(spread):
    logits = (spread * torch.randn(50, 61)).bfloat16()
    targets = torch.randint(0, 61, (50,))
    nll, slope = vocabulary.nll_and_slope(logits, targets, 0.0)
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(nll.double(), -exact.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(slope.double(), exact.exp() - F.one_hot(targets, 61), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_float32_head_is_cast_once_for_all_chunks(make_model, batch_at, monkeypatch, tied, summed):
    """Its gradient is that of casting it for each chunk, bit for bit."""
    monkeypatch.setitem(objectives.CHUNK_ELEMENTS, "cpu", 3 * 61)
    model, batch, casts = make_model(tied), batch_at(0), []
    model.compute_dtype = torch.bfloat16
    cast_to = type(model.lm_head.base).cast_to
    monkeypatch.setattr(
        type(model.lm_head.base), "cast_to", lambda base, dtype: casts.append(dtype) or cast_to(base, dtype)
    )

    def loss():
        return clm(model, batch).total if summed else -token_logprobs(model, batch).sum()

    ours = gradients(model, loss())
    assert casts == [torch.bfloat16] and model.lm_head.base.cast is None
    monkeypatch.setattr(vocabulary.Vocabulary, "leaves", lambda words, dtype: contextlib.nullcontext(words.head()))
    theirs = gradients(model, loss())
    assert len(casts) == 1
    for name in ours:
        assert ours[name].dtype == torch.float32 and torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sum_has_the_gradients_of_the_rows_and_unembeds_once(make_model, chunks, monkeypatch, smoothing):
    model, h_ND, targets_N = make_model(), torch.randn(7, 24), torch.arange(7)
    found = []
    for sums in (False, True):
        model.zero_grad()
        h_ND = h_ND.detach().requires_grad_()
        rows = []
        with monkeypatch.context() as m:
            unembed = model.unembed
            m.setattr(model, "unembed", lambda h, rows=rows, unembed=unembed: rows.append(len(h)) or unembed(h))
            total = (
                surprisal_sum(model, h_ND, targets_N, smoothing)
                if sums
                else surprisal(model, h_ND, targets_N, smoothing).sum()
            )
            (total / 3).backward()
        found.append((total.detach(), h_ND.grad, model.lm_head.base.weight.grad))
        assert sum(rows) == (7 if sums else 14)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_sums_gradient_is_handed_out_once(make_model):
    """It is scaled where it stands; a second time it would be scaled twice."""
    total = surprisal_sum(make_model(), torch.randn(7, 24), torch.arange(7))
    (total / 3).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


def test_no_target_at_all(make_model):
    model = make_model()
    total = surprisal_sum(model, torch.randn(0, 24, requires_grad=True), torch.zeros(0, dtype=torch.long))
    total.backward()
    assert total == 0 and not model.lm_head.base.weight.grad.any()

"""The seq2seq and prefix objectives equal cross-entropy written out, and teach."""

import pytest
import torch
import torch.nn.functional as F

from bildung.data.batches import Example, Shuffled, pack
from bildung.data.prefix_lm import pad_prefix
from bildung.data.seq2seq import Seq2SeqExample, pad_seq2seq
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.train.fit import fit, mean_loss
from bildung.train.prefix_lm import prefix_lm
from bildung.train.seq2seq import seq2seq

CONFIG = dict(
    model_type="transformer",
    vocab_size=20,
    hidden_size=32,
    intermediate_size=48,
    encoder_layers=1,
    decoder_layers=1,
    num_attention_heads=4,
    dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
)


def example(source: list[int], target: list[int]) -> Seq2SeqExample:
    tokens = [1, *target, 2]
    return Seq2SeqExample([*source, 2], Example(tokens, [False] + [True] * (len(tokens) - 1)))


def reversals(count: int) -> list[Seq2SeqExample]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        length = int(torch.randint(2, 6, (), generator=generator))
        tokens = torch.randint(3, 20, (length,), generator=generator).tolist()
        found.append(example(tokens, tokens[::-1]))
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_cross_entropy_of_every_target_token(smoothing: float) -> None:
    model = build(from_dict(CONFIG), seed=1)
    examples = reversals(3)
    loss = seq2seq(model, pad_seq2seq(examples, None), smoothing)
    expected = 0.0
    for one in examples:  # one by one, without padding
        logits = model(torch.tensor([one.source]), torch.tensor([one.target.tokens[:-1]]))[0]
        targets = torch.tensor(one.target.tokens[1:])
        expected += F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    assert loss.count == sum(one.num_targets for one in examples)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    plain = seq2seq(model, pad_seq2seq(examples, None)).total
    model.eval()  # what is measured is the model's own loss
    torch.testing.assert_close(seq2seq(model, pad_seq2seq(examples, None), smoothing).total, plain)


def test_gradients_reach_encoder_and_decoder_and_the_shared_matrix_once() -> None:
    model = build(from_dict(CONFIG), seed=1)
    batch = pad_seq2seq(reversals(3), None)
    seq2seq(model, batch).total.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(float(gradient.abs().sum()) > 0 for name, gradient in ours.items() if "k_proj" not in name)
    model.zero_grad()
    logits = model(batch.source_BS, batch.target.tokens_BL, source_keep_BS=batch.source_keep_BS)[:, :-1]
    is_target = batch.target.loss_mask_BL[:, 1:]
    F.cross_entropy(logits[is_target], batch.target.tokens_BL[:, 1:][is_target], reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_it_learns_to_reverse() -> None:
    """A loss far below that of a model that ignores its source, which knows no letter but the end."""
    model = build(from_dict(CONFIG), seed=1)
    batches = Shuffled(reversals(200), 32, 0, lambda rows: pad_seq2seq(rows, None))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = mean_loss(model, seq2seq, [batches(0)])["loss"]
    fit(model, batches, seq2seq, optimizer, steps=120, seed=0)
    assert mean_loss(model, seq2seq, [batches(0)])["loss"] < 0.5 * before < 2.0


def test_a_recurrent_model_needs_no_more_than_given() -> None:
    """Any model with `given` can be trained: what it gives back is a causal model."""

    class Ignoring(torch.nn.Module):
        def __init__(self, decoder: torch.nn.Module):
            super().__init__()
            self.decoder = decoder

        def given(self, source_BS: torch.Tensor, keep_BS: torch.Tensor | None = None) -> torch.nn.Module:
            assert keep_BS is not None and keep_BS.shape == source_BS.shape
            return self.decoder

    llama = dict(model_type="llama", vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    decoder = build(from_dict({**llama, "num_attention_heads": 2, "max_position_embeddings": 32}))
    loss = seq2seq(Ignoring(decoder), pad_seq2seq(reversals(3), None))
    assert loss.count > 0 and bool(loss.total.isfinite())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_prefix_lm_counts_what_follows_the_prefix_and_packs(make_model, smoothing: float) -> None:
    model = make_model()
    examples = [
        Example([5, 6, 7, 8, 9, 10], [False, False, False, True, True, True]),
        Example([11, 12, 13, 14], [False, True, True, True]),
    ]
    expected = 0.0
    for one in examples:
        tokens = torch.tensor([one.tokens])
        prefix = ~torch.tensor([one.loss_mask])
        logits = model(tokens, prefix_BL=prefix)[0, :-1]
        mask = torch.tensor(one.loss_mask[1:])
        targets = torch.tensor(one.tokens[1:])[mask]
        expected += F.cross_entropy(logits[mask], targets, reduction="sum", label_smoothing=smoothing)
    padded = prefix_lm(model, pad_prefix([[one] for one in examples], None, packed=False), smoothing)
    packed = prefix_lm(model, pad_prefix(pack(examples, 16), None, packed=True), smoothing)
    assert padded.count == packed.count == 6
    torch.testing.assert_close(padded.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.total, expected, rtol=1e-5, atol=1e-5)


def test_a_prefix_is_seen_in_both_directions(make_model) -> None:
    model = make_model()
    rows = [Example([5, 6, 7, 8, 9], [False, False, False, True, True])]
    batch = pad_prefix([rows], None, packed=False)
    other = pad_prefix([[Example([5, 6, 17, 8, 9], rows[0].loss_mask)]], None, packed=False)

    def first(batch):
        return model.hidden(batch.batch.tokens_BL, keep_BL=batch.batch.keep_BL, prefix_BL=batch.prefix_BL)[0, 0]

    assert not torch.allclose(first(batch), first(other))  # token 0 sees token 2

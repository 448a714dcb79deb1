"""BERT's objectives: by hand, equal to transformers' losses, split into micro-steps, and learnable."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from bildung.core.errors import DataError, ModelFileError
from bildung.data.masking import DynamicMasks, MaskedBatch, Masker, Sentences, mask_generator, pad_sentences
from bildung.model.encoder import Encoder
from bildung.model.store import state_tensors
from bildung.train.fit import fit
from bildung.train.masked import mlm, mlm_nsp, nsp
from bildung.train.optim import adamw
from tests.model.tiny_encoder import tiny_encoder, wordpiece

CLS, SEP = 2, 3
TOKENIZER = wordpiece()


def pair(seed: int) -> Sentences:
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(5, TOKENIZER.vocab_size, (5 + seed % 3,), generator=draw).tolist() for _ in range(2))
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    return Sentences([CLS, *first, SEP, *second, SEP], types, seed % 2)


def batch(rows: int = 6) -> MaskedBatch:
    return Masker(TOKENIZER, share=0.3)(pad_sentences([[pair(seed)] for seed in range(rows)], 0), mask_generator(0, 0))


def model(architecture: str = "BertForPreTraining") -> Encoder:
    return tiny_encoder(architecture, initializer_range=0.2).model


@torch.no_grad()
def test_the_losses_are_transformers() -> None:
    ours, given = model(), batch()
    peer = transformers.BertForPreTraining(transformers.BertConfig(**ours.config.raw)).eval()
    peer.load_state_dict(state_tensors(ours), strict=False)
    peer.tie_weights()
    labels = given.targets_BL.masked_fill(~given.chosen_BL, -100)
    expected = peer(
        input_ids=given.tokens_BL,
        attention_mask=given.keep_BL.long(),
        token_type_ids=given.types_BL,
        labels=labels,
        next_sentence_label=given.labels_B,
    )
    found = mlm_nsp(ours, given)
    assert float(found.total / found.count) == pytest.approx(float(expected.loss), abs=1e-5)
    chosen_right = (expected.prediction_logits.argmax(-1) == labels).sum()
    assert float(found.metrics["mlm_accuracy"]) == float(chosen_right)
    pairs_right = (expected.seq_relationship_logits.argmax(-1) == given.labels_B).float().mean()
    assert float(found.metrics["nsp_accuracy"]) / found.count == pytest.approx(float(pairs_right))
    parts = mlm(ours, given), nsp(ours, given)
    assert float(parts[0].total / parts[0].count + parts[1].total / parts[1].count) == pytest.approx(
        float(expected.loss)
    )
    assert [part.count for part in parts] == [given.num_targets, 6]


def test_only_masked_places_are_unembedded(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, given, rows = model(), batch(), []
    unembed = Encoder.unembed
    monkeypatch.setattr(Encoder, "unembed", lambda self, h: (rows.append(h.shape[0]), unembed(self, h))[1])
    mlm(ours, given)
    assert rows == [given.num_targets] and given.num_targets < given.num_tokens / 2


def test_gradients_are_those_of_all_logits() -> None:
    given = batch()
    gradients: list[dict[str, torch.Tensor]] = []
    for whole in (False, True):
        ours = model()
        if whole:
            logits = ours(given.tokens_BL, keep_BL=given.keep_BL, types_BL=given.types_BL)
            labels = given.targets_BL.masked_fill(~given.chosen_BL, -100)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        else:
            loss = mlm(ours, given).total
        loss.backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-4) for name in gradients[0])
    assert "transform.dense.base.weight" in gradients[0]


@torch.no_grad()
def test_packed_rows_give_the_loss_of_padded_ones() -> None:
    ours, texts = model(), [Sentences(pair(seed).tokens, [0] * len(pair(seed))) for seed in range(4)]
    padded = Masker(TOKENIZER, share=0.3)(pad_sentences([[text] for text in texts], 0), mask_generator(0, 0))
    packed = pad_sentences([texts[:2], texts[2:]], 0)
    seen = torch.cat([row[: len(text)] for row, text in zip(padded.tokens_BL, texts, strict=True)])
    chosen = torch.cat([row[: len(text)] for row, text in zip(padded.chosen_BL, texts, strict=True)])
    tokens_BL, chosen_BL = packed.tokens_BL.clone(), packed.chosen_BL.clone()
    tokens_BL[packed.keep_BL], chosen_BL[packed.keep_BL] = seen, chosen
    segments = {"positions_BL": packed.positions_BL, "segments_BL": packed.segments_BL}
    again = MaskedBatch(tokens_BL, packed.targets_BL, chosen_BL, packed.keep_BL, packed.types_BL, **segments)
    assert float(mlm(ours, again).total) == pytest.approx(float(mlm(ours, padded).total), rel=1e-5)


def test_what_is_missing_is_said() -> None:
    text = pad_sentences([[Sentences([CLS, 7, 8, SEP], [0] * 4)]], 0)
    with pytest.raises(DataError, match="are no pairs"):
        nsp(model(), text)
    with pytest.raises(ModelFileError, match="no 'nsp' head"):
        nsp(model("BertForMaskedLM"), batch())
    with pytest.raises(ModelFileError, match="no 'mlm' head"):
        mlm(model("BertModel"), batch())


def test_both_are_learned() -> None:
    """Sentences of one letter: the hidden one is the others; B follows A when it is the same letter."""
    rows = []
    for seed in range(60):
        a, b = 5 + seed % 6, 5 + (seed % 6 if seed % 2 else (seed + 1) % 6)
        rows.append(Sentences([CLS, *[a] * 6, SEP, *[b] * 6, SEP], [0] * 8 + [1] * 7, int(a != b)))
    ours = model().train()
    batches = DynamicMasks(rows, 30, 0, lambda some: pad_sentences([[one] for one in some], 0), Masker(TOKENIZER))
    history = fit(ours, batches, mlm_nsp, adamw(ours, 3e-3), steps=60)
    last = history.rows[-1]
    assert last["mlm_accuracy"] > 0.9 and last["nsp_accuracy"] > 0.9
    assert last["loss"] == pytest.approx(last["mlm_loss"] + last["nsp_loss"])

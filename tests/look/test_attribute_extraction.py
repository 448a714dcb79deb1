"""Attribute extraction: what counts as said, what probes can know, and a model whose facts lie where we put them."""

from __future__ import annotations

import pytest
import torch

from bildung.core.errors import DataError
from bildung.look.patchscopes import attribute_extraction
from bildung.look.patchscopes.attribute_extraction import Extraction, extract, probes
from bildung.look.patchscopes.facts import RELATIONS, Fact, Relation, facts, says
from bildung.look.probing.probes import Options
from tests.model.tiny import tiny_lm

ECHO = Relation("mini:countries", "capital", "{}:")


def test_facts_are_read_and_recognised():
    found, without = facts(RELATIONS["currency"])
    assert Fact("Japan", "yen") in found and Fact("Germany", "euro") in found and len(found) > 190 and without > 10
    assert Fact("Gold", "Au") in facts(RELATIONS["symbol"])[0]
    assert says(" is the Euro.", "euro") and says("dollars", "dollar") and not says("neuron", "euro")
    assert says(" is H.", "H") and not says(" Hungary", "H") and not says(" h ", "H")


def test_the_probe_reads_what_is_there_and_cannot_guess_what_it_never_saw():
    generator = torch.Generator().manual_seed(0)
    names_FD = torch.randn(60, 8, generator=generator)
    classes_F = (names_FD[:, 0] > 0).long() + 2 * (names_FD[:, 1] > 0).long()
    h_FCND = (names_FD[:, None, None] + 0.1 * torch.randn(60, 5, 2, 8, generator=generator)).clone()
    h_FCND[:, :, 1] = torch.randn(60, 5, 8, generator=generator)  # the second layer holds nothing
    options = Options(epochs=40, learning_rate=2e-2, batch_size=64)
    seen, unseen = probes(h_FCND, classes_F, 4, list(range(60)), 0, options)
    assert seen[:, 0].mean() > 0.9 and unseen[:, 0].mean() > 0.6 and seen[:, 1].mean() < 0.55
    # Every name a class of its own: looked up, never read.
    seen, unseen = probes(h_FCND, torch.arange(60), 60, list(range(60)), 0, options)
    assert seen[:, 0].mean() > 0.8 and unseen.sum() == 0


def test_measures_follow_their_definitions():
    hits = torch.zeros(4, 1, 3, dtype=torch.bool)
    hits[0, 0, 1] = hits[2, 0, 1] = hits[1, 0, 2] = hits[3, 0, 2] = True  # even facts at target layer 1, odd ones at 2
    hits[2, 0, 2] = True
    share = torch.zeros(4, 1)
    found = Extraction("", [Fact("", "")] * 4, 4, [0], [0, 1, 2], [], hits, share, share, share, 0.0)
    assert found.any_SN[:, 0].tolist() == [1, 1, 1, 1]
    # Even facts take the odd ones' best target layer, 2, and the odd ones the even ones', 1.
    assert found.one_SN[:, 0].tolist() == [0, 0, 1, 0]


def test_a_model_that_copies_is_found_out(monkeypatch: pytest.MonkeyPatch):
    """The texts decide: with a source vector put in at layer 0, the last layers' guesses are those of that name."""
    lm = tiny_lm(num_hidden_layers=2)
    all_facts = [Fact(f"name{letter}", letter * 3) for letter in "abcdefgh"]
    monkeypatch.setattr(attribute_extraction, "known_facts", lambda lm, relation, every, count, new: (every[:count], 8))
    written: list[int] = []

    def texts(lm: object, target: object, h_RE: torch.Tensor, layers: list[int], new: int) -> list[str]:
        written.extend(layers)
        # The last byte of the name stands in the vector of layer 0, before any mixing: say it three times at layer 1.
        embedded = lm.model.model.embed_tokens.weight  # type: ignore[attr-defined]
        nearest = (h_RE @ embedded.T).argmax(-1)
        return [lm.tokenizer.decode([int(n)]) * 3 if layer else "?" for n, layer in zip(nearest, layers, strict=True)]  # type: ignore[attr-defined]

    monkeypatch.setattr(attribute_extraction, "patched_texts", texts)
    with torch.no_grad():  # blocks that add nothing: the stream is the embedding
        for layer in lm.model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.base.weight.zero_()
    found = extract(lm, ECHO, all_facts, [0, 1], [0, 1], count=6, new_tokens=3, options=Options(epochs=2))
    assert found.any_SN.eq(1).all() and found.hits_SNT[..., 0].sum() == 0 and found.others_SN.sum() == 0
    assert found.one_SN.eq(1).all() and written == [0, 1] * 12


def test_a_model_that_knows_nothing_is_refused():
    with pytest.raises(DataError, match="the model says 0 when asked"):
        extract(tiny_lm(), ECHO, [Fact("a", "bbbb"), Fact("c", "dddd")], [0], [0], count=2, new_tokens=2)

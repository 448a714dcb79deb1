"""Patchscopes: the logit lens and the tuned lens are special cases, a patch is a patch, and maps know their models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bildung.core.errors import BadIntervention, DataError, ModelFileError, NoSuchSite, SettingsError
from bildung.look.lenses.lens import lens_logits
from bildung.look.lenses.translators import new_lens
from bildung.look.patchscopes.patch_targets import NAMED, Target, place_of, target_prompt
from bildung.look.patchscopes.patchscopes import (
    Cell,
    identity,
    mapped,
    patched_logits,
    patched_texts,
    patchscope,
    streams,
)
from bildung.look.patchscopes.stream_maps import check_belongs, learn_maps, read_maps, shared_positions, write_maps
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene
from tests.conftest import tiny_tokenizer
from tests.model.tiny import tiny_lm

TEXT = "The capital of France is Paris, not Rome"


def lm3(**changes: object) -> LanguageModel:
    return tiny_lm(num_hidden_layers=3, max_position_embeddings=200, **changes)


@pytest.mark.parametrize("target", ["token_identity", "a", "Rome {}"])
def test_the_logit_lens_is_a_patchscope_bit_for_bit(target: str):
    lm = lm3()
    tokens = lm.tokenizer.encode(TEXT)
    place = target_prompt(lm, target)
    assert place.position == len(place.tokens) - 1  # it is read where it is patched
    cells = [Cell(position, layer, 2) for layer in range(3) for position in range(len(tokens))]
    h_RE, said_R = mapped(lm, lm, tokens, cells, identity)
    h_NLD, next_L = streams(lm, tokens)
    assert torch.equal(
        patched_logits(lm.model, place, h_RE, [2] * len(cells)), lens_logits(lm.model, h_NLD.flatten(0, 1))
    )
    assert said_R.tolist() == next_L.tolist() * 3
    found = patchscope(lm, tokens, place, cells)
    assert torch.equal(found.top_ids_RK[-len(tokens) :, 0], next_L)  # the last layer of the source: its own prediction


def test_the_tuned_lens_is_a_patchscope_with_its_map():
    lm = lm3()
    lens = new_lens(lm)
    for parameter in lens.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05, generator=torch.Generator().manual_seed(1))
    tokens, cells = lm.tokenizer.encode(TEXT), [Cell(4, layer, 2) for layer in range(3)]
    place = target_prompt(lm, "description")
    h_RE, _ = mapped(lm, lm, tokens, cells, lambda h, layer, target_layer: lens(h, layer))
    h_NLD, _ = streams(lm, tokens)
    expected = torch.stack([lens(h_NLD[layer, 4], layer) for layer in range(3)])
    assert torch.equal(patched_logits(lm.model, place, h_RE, [2] * 3), lens_logits(lm.model, expected))
    assert not torch.equal(expected[0], h_NLD[0, 4])


def test_a_patch_is_made_at_its_layer_and_place_and_in_the_prompt_alone():
    lm = lm3()
    tokens, place = lm.tokenizer.encode(TEXT), target_prompt(lm, "It is {} now")
    cells = [Cell(7, layer, target_layer) for layer in range(3) for target_layer in range(3)]
    h_RE, _ = mapped(lm, lm, tokens, cells, identity)
    found, texts = patched_logits(lm.model, place, h_RE, [c.target_layer for c in cells], rows=4), []
    for cell, h_E, logits_V in zip(cells, h_RE, found, strict=True):

        def put(x_BLD: torch.Tensor, h_E: torch.Tensor = h_E) -> torch.Tensor:
            x_BLD = x_BLD.clone()
            x_BLD[:, place.position] = h_E
            return x_BLD

        # Plainly: the whole text again for every token, without a cache.
        ids, written = list(place.tokens), []
        with intervene(lm.model, {f"layers.{cell.target_layer}.resid_post": put}), torch.no_grad():
            for _ in range(5):
                last_V = lm.model(torch.tensor([ids]))[0, -1]
                if not written:
                    assert torch.allclose(logits_V, last_V, atol=1e-4)
                written.append(int(last_V.argmax()))
                ids.append(written[-1])
        texts.append(lm.tokenizer.decode(place.tokens + written)[len(lm.tokenizer.decode(place.tokens)) :])
    got = patched_texts(lm, place, h_RE, [c.target_layer for c in cells], 5, rows=4)
    assert got == texts and len(set(got)) > 1


def test_between_models_of_other_widths_depths_and_tokenizers(tmp_path: Path):
    a = lm3()
    b = tiny_lm(hidden_size=128, num_hidden_layers=2, vocab_size=300)
    b.tokenizer = tiny_tokenizer()
    texts = [
        f"The capital of {name} is what number {n} says, the city of Rome."
        for n in range(40)
        for name in ("Spain", "it")
    ]
    (ids, other), places = shared_positions(a, b, texts[0], 64)
    assert len(other) < len(ids) and len(places) > 25  # the end of every token of B that is not a space
    for i, j in places:
        assert a.tokenizer.decode(ids[: i + 1]) == b.tokenizer.decode(other[: j + 1])
    maps, explained, count = learn_maps(a, b, texts, [(1, 1), (2, 0)], longest=64)
    assert count > 192 and explained[1, 1] > 0.3
    tokens, place = a.tokenizer.encode(TEXT), target_prompt(b, "It is {}")
    found = patchscope(a, tokens, place, [Cell(7, 1, 1), Cell(7, 2, 0)], into=b, f=maps, new_tokens=3)
    h_NLD, _ = streams(a, tokens)
    weight, bias = maps.maps[1, 1]
    assert found.expected_R is None and len(found.texts) == 2
    assert found.top_ids_RK[0, 0] == lens_logits(b.model, h_NLD[1, 7] @ weight.T + bias).argmax()
    # Saved with both hashes; refused on others.
    write_maps(maps, tmp_path)
    again = read_maps(tmp_path, a, b)
    assert torch.equal(again.maps[2, 0][0], maps.maps[2, 0][0])
    with torch.no_grad():
        b.model.model.norm.weight[0] += 1
    with pytest.raises(ModelFileError, match="this map's target"):
        read_maps(tmp_path, a, b)
    with pytest.raises(ModelFileError, match="this map's source"):
        check_belongs(maps, b, b)
    with pytest.raises(SettingsError, match="1 -> 1, 2 -> 0"):
        maps(h_NLD[0], 0, 0)
    with pytest.raises(DataError, match="more positions than numbers"):
        learn_maps(a, b, texts[:9], [(1, 1)], longest=30)


def test_least_squares_finds_an_affine_map_that_is_there():
    a, b = lm3(), lm3()
    with torch.no_grad():  # B's stream is A's, twice as long from the embedding on; the norms take the length out again
        b.model.model.embed_tokens.weight *= 2
        for layer in b.model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.base.weight *= 2
    texts = [f"{n} bottles of beer on the wall, {n * n} of wine, {n**3} of milk" for n in range(40)]
    maps, explained, _ = learn_maps(a, b, texts, [(1, 1)], longest=64)
    h_NLD, _ = streams(a, a.tokenizer.encode(TEXT))
    assert explained[1, 1] > 0.999
    assert (maps(h_NLD[1, 1:], 1, 1) - 2 * h_NLD[1, 1:]).norm() < 0.3 * h_NLD[1, 1:].norm()


def test_target_prompts_and_places():
    lm = lm3()
    place = target_prompt(lm, "The capital of {} is")
    assert lm.tokenizer.decode(place.tokens[: place.position + 1]) == "The capital of x"
    assert lm.tokenizer.decode(target_prompt(lm, "token_identity").tokens) == NAMED["token_identity"]
    tokens = lm.tokenizer.encode(TEXT)
    assert lm.tokenizer.decode(tokens[: place_of(lm, TEXT, tokens, "France") + 1]) == "The capital of France"
    assert place_of(lm, TEXT, tokens, -1) == len(tokens) - 1
    with pytest.raises(DataError, match="does not occur"):
        place_of(lm, TEXT, tokens, "Berlin")
    with pytest.raises(DataError, match="give one"):
        target_prompt(lm, "{} and {}")


def test_what_cannot_be_is_refused():
    lm, other = lm3(), tiny_lm(hidden_size=128)
    tokens, place = lm.tokenizer.encode(TEXT), target_prompt(lm, "a {}")
    with pytest.raises(DataError, match="position 500 lies past the source prompt"):
        place_of(lm, TEXT, tokens, 500)
    with pytest.raises(DataError, match="position 99 lies past the source prompt"):
        patchscope(lm, tokens, place, [Cell(99, 0, 0)])
    with pytest.raises(DataError, match="past the target prompt"):
        target_prompt(lm, "a", 7)
    with pytest.raises(DataError, match="past the target prompt"):
        patchscope(lm, tokens, Target(place.tokens, 50), [Cell(0, 0, 0)])
    with pytest.raises(NoSuchSite, match="layer 3 of the source does not exist"):
        patchscope(lm, tokens, place, [Cell(0, 3, 0)])
    with pytest.raises(NoSuchSite, match="layer 2 of the target"):
        patchscope(lm, tokens, place, [Cell(0, 0, 2)], into=other, f=lambda h, a, b: h[:, :128])
    with pytest.raises(DataError, match="192 numbers and the target's 128"):
        patchscope(lm, tokens, place, [Cell(0, 0, 0)], into=other)
    with pytest.raises(BadIntervention, match=r"f returned \(1, 100\)"):
        patchscope(lm, tokens, place, [Cell(0, 0, 0)], into=other, f=lambda h, a, b: h[:, :100])
    with pytest.raises(DataError, match="source prompt has 201"):
        patchscope(lm, [5] * 201, place, [Cell(0, 0, 0)])
    with pytest.raises(SettingsError, match="exceed the model's context"):
        patchscope(lm, tokens, place, [Cell(0, 0, 0)], new_tokens=198)

"""The logit lens: its last row is the model, its measures follow their definitions, and it sees what a tune changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.core.errors import DataError, TokenizerError
from bildung.look import logit_lens as operation
from bildung.look.lenses.lens import kl, lens_difference, lens_logits, logit_lens
from bildung.look.lenses.translators import new_lens, write_lens
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import Linear
from bildung.model.low_rank import LowRank
from bildung.model.store import LanguageModel
from bildung.model.taps import observe
from bildung.run.write import write
from tests.contract.test_families import made
from tests.model.tiny import tiny_lm
from tests.model.tiny_encoder import tiny_encoder

TEXT = "a <b> & $x$ end"


def tuned(lm: LanguageModel, size: float = 0.5) -> LanguageModel:
    """The model with a low-rank delta in its last layer."""
    linear: Linear = lm.model.linears()["model.layers.1.mlp.down_proj"]
    delta = LowRank(linear.in_features, linear.out_features, rank=2, scaling=1.0)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_(0, size, generator=torch.Generator().manual_seed(5))
    linear.deltas["tune"] = delta
    return lm


def test_last_row_is_the_model_itself():
    lm = tiny_lm()
    tokens_BL = torch.tensor([lm.tokenizer.encode(TEXT)])
    with observe(lm.model, "layers.1.resid_post") as seen:
        logits_BLV = lm.model(tokens_BL)
    # Bit for bit: the final norm is applied once, by the lens.
    assert torch.equal(lens_logits(lm.model, seen["layers.1.resid_post"]), logits_BLV)
    lens = logit_lens(lm, TEXT)
    probs = logits_BLV[0].softmax(-1)
    assert torch.equal(lens.top_ids_NLK[-1, :, 0], logits_BLV[0].argmax(-1))
    assert torch.allclose(lens.top_probs_NLK[-1, :, 0], probs.amax(-1))
    assert lens.rank_NL[-1].eq(1).all() and lens.kl_NL[-1].eq(0).all()
    assert lens.next_probs_NL[-1, 2].item() == pytest.approx(probs[2, tokens_BL[0, 3]].item())
    assert lens.next_probs_NL[:, -1].isnan().all()


def test_the_embedding_of_the_final_norm_twice_would_be_another_lens():
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.model.norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    with observe(lm.model, "layers.1.resid_post") as seen:
        logits_BLV = lm.model(torch.tensor([[5, 6, 7]]))
    twice = lens_logits(lm.model, lm.model.model.norm(seen["layers.1.resid_post"]))
    assert (twice - logits_BLV).abs().max() > 0.1


def test_measures_follow_their_definitions():
    lm = tiny_lm()
    lens = logit_lens(lm, TEXT)
    tokens_BL = torch.tensor([lens.tokens])
    with observe(lm.model, "layers.0.resid_post") as seen:
        final = lm.model(tokens_BL)[0].softmax(-1)
    row = lens_logits(lm.model, seen["layers.0.resid_post"])[0].softmax(-1)
    assert torch.allclose(lens.kl_NL[0], (final * (final / row).log()).sum(-1), atol=1e-5)
    assert torch.allclose(lens.entropy_NL[0], torch.distributions.Categorical(row).entropy(), atol=1e-5)
    best = final.argmax(-1)
    ranked = row.argsort(-1, descending=True)
    assert lens.rank_NL[0].tolist() == [ranked[i].tolist().index(best[i].item()) + 1 for i in range(len(best))]


def test_kl_is_zero_for_equal_and_known_for_known():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert kl(p, p).item() == 0
    assert kl(p, q).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_text_ids_and_chat_are_read(tmp_path: Path):
    lm = tiny_lm()
    ids = lm.tokenizer.encode(TEXT)
    assert logit_lens(lm, ids).tokens == logit_lens(lm, torch.tensor([ids])).tokens == logit_lens(lm, TEXT).tokens
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert lm.tokenizer.decode(logit_lens(lm, "hi", chat=True).tokens).endswith("<user>hi<a>")
    with pytest.raises(DataError, match="1 to 4"):
        logit_lens(lm, TEXT, max_tokens=4)
    with pytest.raises(DataError, match=r"129 tokens; 1 to 128 are the context of this llama\. Shorten it\.$"):
        logit_lens(lm, "a" * 129)
    with pytest.raises(DataError, match="0 tokens"):
        logit_lens(lm, [])
    for no_ids in ([[1, 2], [3, 4]], [1.5, 2.0], torch.tensor([True])):  # two texts are not one, nor are numbers ids
        with pytest.raises(DataError, match="the ids of one text"):
            logit_lens(lm, no_ids)
    with pytest.raises(DataError, match="999"):
        logit_lens(lm, [5, 999])


def test_difference_sees_where_a_tune_acts():
    a, b = tiny_lm(), tuned(tiny_lm())
    seen = lens_difference(a, b, TEXT)
    # The delta sits in the last layer: before it nothing differs.
    assert seen.kl_NL[0].abs().max() == 0 and seen.kl_NL[1].min() > 1e-4
    differs = seen.a.top_ids_NLK[1, :, 0] != seen.b.top_ids_NLK[1, :, 0]
    assert differs.any() and seen.first_L.tolist() == [1 if d else -1 for d in differs.tolist()]
    assert lens_difference(a, tiny_lm(), TEXT).first_L.eq(-1).all()
    logits = [lm.model(torch.tensor([seen.a.tokens]))[0].log_softmax(-1) for lm in (a, b)]
    assert torch.allclose(seen.kl_NL[-1], kl(*logits), atol=1e-5)


def test_difference_refuses_other_tokenizers_and_shapes():
    a, b = tiny_lm(), tiny_lm()
    b.tokenizer.backend.add_tokens(["end"])
    with pytest.raises(TokenizerError, match="share a tokenizer"):
        lens_difference(a, b, TEXT)
    with pytest.raises(TokenizerError, match="260 and 300"):
        lens_difference(a, tiny_lm(vocab_size=300), TEXT)
    with pytest.raises(DataError, match="2 and 3 layers"):
        lens_difference(a, tiny_lm(num_hidden_layers=3), TEXT)


def test_operation_leaves_page_picture_and_numbers(tmp_path: Path):
    bildung.save(tiny_lm(), tmp_path / "base")
    base = bildung.load(tmp_path / "base")
    bildung.save(tuned(base), tmp_path / "tuned")  # an adapter directory
    settings = operation.Settings(prompt="</script><script>alert(1)</script>", against=tmp_path / "tuned")
    record = operation.logit_lens(tmp_path / "base", tmp_path / "out", settings)
    page = (tmp_path / "out/lens.html").read_text()
    assert "<script>alert(1)" not in page and page.count("</script>") == 2
    assert "http://" not in page and "https://" not in page and "default-src &#39;none&#39;" in page
    numbers = json.loads((tmp_path / "out/lens.json").read_text())
    assert len(numbers["kl_ab"]) == 2 and len(numbers["kl_ab"][0]) == len(numbers["tokens"])
    assert numbers["words"].keys() >= {str(i) for row in numbers["b"]["top_ids"] for top in row for i in top}
    assert (tmp_path / "out/lens.png").read_bytes()[:4] == b"\x89PNG"
    assert record.companions["against"]["path"] == "../tuned" and record.tokens_seen == len(numbers["tokens"])
    assert record.measured["positions with another top token"] > 0
    again = operation.logit_lens(tmp_path / "base", tmp_path / "out", settings)
    assert again == record  # up to date


def test_a_directory_in_bfloat16_is_looked_at_in_float32_and_keeps_its_tuned_lens(tmp_path: Path):
    lm = tiny_lm()
    lm.model.bfloat16()
    place = bildung.save(lm, tmp_path / "half")
    (tmp_path / "tuned").mkdir()
    write_lens(new_lens(bildung.load(place)), tmp_path / "tuned")
    operation.logit_lens(place, tmp_path / "out", operation.Settings(prompt=TEXT, tuned=tmp_path / "tuned"))
    numbers = torch.tensor(json.loads((tmp_path / "out/lens.json").read_text())["a"]["kl"])
    wide, narrow = (logit_lens(bildung.load(place, dtype), TEXT).kl_NL for dtype in ("float32", None))
    assert torch.allclose(numbers, wide, rtol=1e-3) and not torch.allclose(numbers, narrow, rtol=1e-2)


def test_quantized_model_has_a_lens(tmp_path: Path):
    from bildung.model.int8 import Int8
    from bildung.model.linear import replace_stores

    lm = tiny_lm()
    replace_stores(lm.model, "all", lambda linear: Int8.quantize(linear.weight()))
    lens = logit_lens(lm, TEXT)
    assert torch.equal(lens.top_ids_NLK[-1, :, 0], lm.model(torch.tensor([lens.tokens]))[0].argmax(-1))


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "gemma3_text", "final_logit_softcapping": 3.0, "sliding_window": 4},
        {"model_type": "gpt2", "n_embd": 192, "n_layer": 2, "n_head": 6},
    ],
    ids=["gemma3_text", "gpt2"],
)
def test_norms_scales_and_soft_caps_are_the_model_s_own(raw: dict[str, Any]) -> None:
    lm = tiny_lm()
    keys = {"vocab_size": 260, "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 32}
    keys |= {"num_key_value_heads": 2, "intermediate_size": 320, "initializer_range": 0.5}
    gpt2 = {"vocab_size": 260, "initializer_range": 0.5}
    config = from_dict(
        {**(gpt2 if raw["model_type"] == "gpt2" else keys), **raw, "bos_token_id": 256, "eos_token_id": 257}
    )
    other = LanguageModel(build(config, seed=1).eval(), lm.tokenizer, config)
    ids = torch.tensor([lm.tokenizer.encode(TEXT)])
    with observe(other.model, "layers.1.resid_post") as seen, torch.no_grad():
        logits_BLV = other.model(ids)
        lens = lens_logits(other.model, seen["layers.1.resid_post"])
        without_cap = other.model.lm_head(other.model.final_norm(seen["layers.1.resid_post"]))
    assert torch.equal(lens, logits_BLV)
    if raw["model_type"] == "gemma3_text":
        assert lens.abs().max() <= 3 < without_cap.abs().max()


def test_a_masked_encoder_is_read_through_its_head_in_place() -> None:
    lm = tiny_encoder(initializer_range=0.3)
    lens = logit_lens(lm, "the [MASK] sat on a mat")
    assert lens.labels[0] == "[CLS]" and lens.labels[2] == "[MASK]" and lens.labels[-1] == "[SEP]"
    ids = torch.tensor([lens.tokens])
    with torch.no_grad(), observe(lm.model, "layers.*.resid_post") as seen:
        logits_LV = lm.model(ids)[0]
        first_LV = lm.model.unembed(seen["layers.0.resid_post"])[0]  # post-norm: nothing lies between
    for row, logits in ((0, first_LV), (1, logits_LV)):
        assert torch.equal(lens.top_ids_NLK[row, :, 0], logits.argmax(-1))
        own_L = logits.softmax(-1).gather(-1, ids[0][:, None])[:, 0]
        torch.testing.assert_close(lens.next_probs_NL[row], own_L)
    assert (lens.kl_NL[-1] == 0).all() and (lens.kl_NL[0] > 0).all()
    with pytest.raises(DataError, match="nor has a masked-language head"):
        logit_lens(tiny_encoder("BertForSequenceClassification"), "the cat")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_model_that_answers_a_source_is_read_in_its_decoder(family: str) -> None:
    lm = made(family)
    source, answer = [5, 6, 7, 8, 257], [258, 9, 10]
    lens = logit_lens(lm, source, answer=answer)
    with torch.no_grad():
        logits_LV = lm.model(torch.tensor([source]), torch.tensor([answer]))[0]
    assert lens.tokens == answer and (lens.rank_NL[-1] == 1).all() and (lens.kl_NL[-1] == 0).all()
    assert torch.equal(lens.top_ids_NLK[-1, :, 0], logits_LV.argmax(-1))
    own = logit_lens(lm, source)
    said = write(lm.model, lm.tokenizer, [source], 16)[0][0].tokens
    assert own.tokens == [258, *(one for one in said if one != 257)]
    assert (lens_difference(lm, lm, source).kl_NL == 0).all()
    other = logit_lens(lm, source[:2], answer=answer)
    assert not torch.equal(other.top_probs_NLK, lens.top_probs_NLK)  # another source, other predictions
    with pytest.raises(DataError, match="by one tanh"):
        logit_lens(made("rnn_seq2seq"), source)

"""muP: the table's numbers, and the coordinate check that shows what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bildung
from bildung.core.errors import SettingsError
from bildung.data.batches import Batch, Example, pad
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.model.taps import observe
from bildung.model.transformer import Decoder
from bildung.train import mup
from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import adamw
from tests.conftest import tiny_tokenizer

WIDTHS = (64, 128, 256, 512)
STEPS, RATE = 4, 0.01


def decoder(width: int, vocab_size: int = 61, head_dim: int = 16, **more: object) -> Decoder:
    keys = dict(model_type="llama", vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width)
    keys |= dict(num_hidden_layers=2, num_attention_heads=width // head_dim, max_position_embeddings=64)
    # At the base width of 64 a deviation of 1/8 keeps the size of what passes through a matrix.
    keys |= dict(initializer_range=0.125, tie_word_embeddings=False)
    model: Decoder = build(from_dict({**keys, **more}), seed=1)
    return model


def test_the_table() -> None:
    wide = decoder(256, attention_bias=True)
    plain = {name: parameter.detach().clone() for name, parameter in wide.named_parameters()}
    by_name = mup.factors(wide, base_width=64)
    mup.start(wide, by_name)
    layer = "model.layers.1"
    for name, start, rate in (
        ("model.embed_tokens.weight", 1, 1),
        ("model.norm.weight", 1, 1),
        (f"{layer}.input_layernorm.weight", 1, 1),
        (f"{layer}.self_attn.q_proj.bias", 1, 1),
        (f"{layer}.self_attn.q_proj.base.weight", 1 / 2, 1 / 4),
        (f"{layer}.mlp.down_proj.base.weight", 1 / 2, 1 / 4),
        ("lm_head.base.weight", 1 / 4, 1 / 4),
    ):
        assert by_name[name] == (start, rate), name
        assert torch.equal(dict(wide.named_parameters())[name], plain[name] * start), name
    muon = mup.factors(wide, base_width=64, muon=True)
    assert muon[f"{layer}.mlp.up_proj.base.weight"] == (1 / 2, 1 / 2), "its updates grow with the root of the width"
    optimizer = mup.at_rates(adamw(wide, 0.1, weight_decay=0.2), wide, by_name)
    groups = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [(0.1, 0.2), (0.025, 0.8), (0.1, 0.0)], "decay takes the same share per step"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(plain)


def test_wider_heads_divide_scores_by_their_width() -> None:
    wide = decoder(128, head_dim=32)
    by_name = mup.factors(wide, base_width=64, base_head_dim=16)
    start, rate = by_name["model.layers.0.self_attn.q_proj.base.weight"]
    assert (start, rate) == pytest.approx((0.5**0.5 * 0.5**0.5, 0.5 * 0.5**0.5))
    assert by_name["model.layers.0.self_attn.k_proj.base.weight"] == pytest.approx((0.5**0.5, 0.5))


def test_what_mup_cannot_be_put_on() -> None:
    with pytest.raises(SettingsError, match="tie_word_embeddings: false"):
        mup.factors(decoder(64, tie_word_embeddings=True), 64)
    with pytest.raises(SettingsError, match="normalises its queries"):
        mup.factors(decoder(64, model_type="qwen3"), 64, base_head_dim=8)
    recurrent = build(from_dict({"model_type": "rnn", "vocab_size": 61, "hidden_size": 16}))
    with pytest.raises(SettingsError, match="for decoders"):
        mup.factors(recurrent, 64)


def batch_at(n: int) -> Batch:
    rows = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(n)).tolist()
    return pad([Example(row, [False] + [True] * 15) for row in rows], None)


def sizes(width: int, maximal: bool) -> dict[str, float]:
    """How far a few steps move what stands at each site: the mean absolute change, per number."""
    model = decoder(width)
    torch.nn.init.zeros_(model.lm_head.base.weight)  # the paper's advice (D.2): what is left of the start is no effect
    optimizer: torch.optim.Optimizer
    if maximal:
        by_name = mup.factors(model, WIDTHS[0])
        mup.start(model, by_name)
        optimizer = mup.at_rates(adamw(model, RATE), model, by_name)
    else:
        optimizer = adamw(model, RATE)
    sites = ["layers.1.attn.scores", "layers.1.resid_post", "logits"]
    seen = []
    for learns in (False, True):
        if learns:
            fit(model, lambda _: batch_at(0), clm, optimizer, steps=STEPS)
        with torch.no_grad(), observe(model, sites) as found:
            model(batch_at(0).tokens_BL)
        seen.append({site: torch.nan_to_num(found[site].float(), neginf=0.0) for site in sites})
    return {site: float((seen[1][site] - seen[0][site]).abs().mean()) for site in sites}


def test_coordinate_check() -> None:
    """Yang et al. 2022, appendix D.1: under muP a step's effect is of one size at every width."""
    maximal = [sizes(width, maximal=True) for width in WIDTHS]
    standard = [sizes(width, maximal=False) for width in WIDTHS]
    for site in maximal[0]:
        flat = [found[site] for found in maximal]
        growing = [found[site] for found in standard]
        assert max(flat) < 2.0 * min(flat), (site, flat)
        assert growing[-1] > 2.0 * growing[0], (site, growing)


@pytest.mark.filterwarnings("ignore")
def test_the_directory_is_an_ordinary_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tiny_tokenizer()
    model = decoder(64, tokenizer.vocab_size, head_dim=32)
    by_name = mup.factors(model, base_width=32, base_head_dim=16)
    mup.start(model, by_name)
    fit(model, batch_at, clm, mup.at_rates(adamw(model, RATE), model, by_name), steps=3)
    bildung.save(LanguageModel(model, tokenizer, model.config), tmp_path / "model")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = batch_at(7).tokens_BL
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)

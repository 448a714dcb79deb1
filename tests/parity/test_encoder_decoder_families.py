"""Encoder states and logits equal transformers' on random configs of every encoder-decoder family; mutants' do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import bildung
from bildung.core.errors import ConfigError, DataError
from bildung.model import attention, encoder_decoder, positions
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel, assemble, state_tensors
from tests.conftest import tiny_tokenizer

T5: dict[str, Any] = dict(
    vocab_size=311,
    d_model=48,
    d_kv=10,  # 6 heads of 10: not d_model
    d_ff=80,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=6,
    relative_attention_num_buckets=12,
    relative_attention_max_distance=17,
    decoder_start_token_id=0,
)
BART: dict[str, Any] = dict(
    vocab_size=311,
    d_model=48,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=6,
    decoder_attention_heads=4,
    encoder_ffn_dim=80,
    decoder_ffn_dim=56,
    max_position_embeddings=64,
    init_std=0.2,
)
MARIAN = {**BART, "pad_token_id": 100, "decoder_start_token_id": 100}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-1.1": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-silu": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-silu"}),
    "bart": ("BartForConditionalGeneration", BART),
    "bart-scaled": ("BartForConditionalGeneration", {**BART, "scale_embedding": True, "activation_function": "relu"}),
    "marian": ("MarianMTModel", {**MARIAN, "activation_function": "swish"}),
    "marian-scaled": ("MarianMTModel", {**MARIAN, "scale_embedding": True}),
}
SOURCE_BS = torch.randint(1, 100, (3, 19), generator=torch.Generator().manual_seed(1))
TARGET_BL = torch.randint(1, 100, (3, 23), generator=torch.Generator().manual_seed(2))
KEEP_BS = torch.arange(19)[None] < torch.tensor([[19], [4], [11]])


def peer_of(name: str) -> Any:
    architecture, changes = CONFIGS[name]
    peer_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    peer = peer_class(peer_class.config_class(**changes)).eval()
    for key, parameter in peer.named_parameters():
        if "norm" in key or key.endswith("bias"):  # transformers leaves ones and zeros, which would hide a swap
            nn.init.normal_(parameter, 1.0, 0.3)
        if "relative_attention_bias" in key:
            nn.init.normal_(parameter, 0.0, 1.0)
    if "final_logits_bias" in peer.state_dict():
        nn.init.normal_(peer.final_logits_bias, 0.0, 1.0)
    if name == "t5-1.1":
        peer.lm_head.weight = nn.Parameter(torch.randn_like(peer.lm_head.weight))
    return peer


def ours_of(peer: Any) -> encoder_decoder.EncoderDecoder:
    raw = json.loads(peer.config.to_json_string(use_diff=False))
    tensors = {key: tensor.clone() for key, tensor in peer.state_dict().items()}
    model: encoder_decoder.EncoderDecoder = assemble(from_dict(raw), tensors)
    return model


@torch.no_grad()
def worst(peer: Any, ours: encoder_decoder.EncoderDecoder, keep_BS: Tensor | None = None) -> tuple[float, float]:
    """The largest difference of encoder states (of real tokens) and of logits."""
    mask = None if keep_BS is None else keep_BS.long()
    theirs = peer(input_ids=SOURCE_BS, attention_mask=mask, decoder_input_ids=TARGET_BL)
    real_BS = torch.ones_like(SOURCE_BS, dtype=torch.bool) if keep_BS is None else keep_BS
    states = (theirs.encoder_last_hidden_state - ours.encode(SOURCE_BS, keep_BS).states_BSD)[real_BS]
    logits = theirs.logits - ours(SOURCE_BS, TARGET_BL, source_keep_BS=keep_BS)
    return float(states.abs().max()), float(logits.abs().max())


def closeness(logits: Tensor) -> float:
    """1e-5 of logits of ordinary size; T5's reach hundreds, where float32 itself resolves less."""
    return 1e-5 * max(1.0, float(logits.abs().max()) / 10)


@pytest.mark.parametrize("name", CONFIGS)
def test_states_and_logits_equal_transformers(name: str) -> None:
    peer = peer_of(name)
    ours = ours_of(peer)
    size = closeness(ours(SOURCE_BS, TARGET_BL).detach())
    for keep_BS in (None, KEEP_BS):
        states, logits = worst(peer, ours, keep_BS)
        assert states < 1e-5
        assert logits < size


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_directories_open_in_transformers_and_hold_the_same_bits(name: str, tmp_path: Path) -> None:
    peer = peer_of(name)
    peer.save_pretrained(tmp_path / "theirs")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    ours = assemble(from_dict(raw), {key: tensor.clone() for key, tensor in peer.state_dict().items()})
    bildung.save(LanguageModel(ours, tiny_tokenizer(), ours.config), tmp_path / "ours")
    back = type(peer).from_pretrained(tmp_path / "ours").eval()
    for key, tensor in peer.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[key]), key
    assert worst(back, ours)[1] < closeness(ours(SOURCE_BS, TARGET_BL).detach())
    again = bildung.load(tmp_path / "ours").model
    for key, tensor in state_tensors(ours).items():
        assert torch.equal(tensor, state_tensors(again)[key]), key


def test_tying_of_t5_is_read_from_config_and_file() -> None:
    """Published 1.1 configs say `tie_word_embeddings: false` and nothing of scale_decoder_outputs."""
    peer = peer_of("t5-1.1")
    raw = json.loads(peer.config.to_json_string(use_diff=False))
    published = {k: v for k, v in raw.items() if k != "scale_decoder_outputs"} | {"tie_word_embeddings": False}
    for given in (raw, published):
        ours = assemble(from_dict(given), {key: tensor.clone() for key, tensor in peer.state_dict().items()})
        assert not ours.config.tie_word_embeddings
        assert ours.config.logit_scale == 1.0
        assert torch.equal(state_tensors(ours)["lm_head.weight"], peer.lm_head.weight)
    assert ours_of(peer_of("t5")).config.tie_word_embeddings


def test_t5_starts_with_the_spreads_of_its_paper() -> None:
    raw = {"model_type": "t5", **T5, "d_model": 96, "d_kv": 16}
    for factor in (1.0, 0.5):
        model = build(from_dict({**raw, "initializer_factor": factor}))
        block = model.decoder.layers[0]
        for weight, spread in (
            (model.shared.weight, 1.0),
            (block.self_attn.q_proj.weight(), (96 * 16) ** -0.5),
            (block.cross_attn.k_proj.weight(), 96**-0.5),
            (block.mlp.down_proj.weight(), 80**-0.5),
        ):
            assert float(weight.detach().std()) == pytest.approx(factor * spread, rel=0.05)


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    ours = ours_of(peer_of(name))
    with torch.no_grad():
        alone = ours(SOURCE_BS[1:2, :4], TARGET_BL[1:2])
        size = closeness(alone)
        right = ours(SOURCE_BS[1:2], TARGET_BL[1:2], source_keep_BS=KEEP_BS[1:2])
        left = ours(SOURCE_BS[1:2].roll(-4, 1), TARGET_BL[1:2], source_keep_BS=KEEP_BS[1:2].flip(1))
        assert float((alone - right).abs().max()) < size
        assert float((alone - left).abs().max()) < size
        # The target padded on the left, positions counted from its first real token.
        keep_BL = torch.arange(23)[None] >= 9
        conditioned = ours.given(SOURCE_BS[1:2, :4])
        padded = conditioned(TARGET_BL[1:2], keep_BL=keep_BL, positions_BL=(keep_BL.cumsum(1) - 1).clamp(min=0))[:, 9:]
        assert float((padded - conditioned(TARGET_BL[1:2, 9:])).abs().max()) < size


@pytest.mark.parametrize("name", ["t5", "t5-1.1", "bart-scaled", "marian"])
def test_cached_decoding_is_uncached_decoding(name: str) -> None:
    ours = ours_of(peer_of(name))
    with torch.no_grad():
        conditioned = ours.given(SOURCE_BS, KEEP_BS)
        whole = conditioned(TARGET_BL)
        cache = conditioned.kv_cache(3, 23)
        pieces = [conditioned(TARGET_BL[:, start:end], kv_cache=cache) for start, end in ((0, 5), (5, 6), (6, 23))]
        assert float((whole - torch.cat(pieces, dim=1)).abs().max()) < closeness(whole)
        # Other rows of the sources, as beam search takes them.
        rows = torch.tensor([2, 2, 0])
        cache.select(rows)
        cache.length = 6
        chosen = conditioned.select(rows)(TARGET_BL[rows, 6:], kv_cache=cache)
        assert float((whole[rows][:, 6:] - chosen).abs().max()) < closeness(whole)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_explicit_attention_equals_the_kernels(name: str) -> None:
    ours = ours_of(peer_of(name))
    with torch.no_grad():
        kernel = ours(SOURCE_BS, TARGET_BL, source_keep_BS=KEEP_BS)
        with bildung.observe(ours, ["encoder.*.probs", "decoder.*.probs", "decoder.*.cross.*"]) as seen:
            explicit = ours(SOURCE_BS, TARGET_BL, source_keep_BS=KEEP_BS)
    assert float((kernel - explicit).abs().max()) < closeness(kernel)
    cross = seen["decoder.layers.2.cross.probs"]
    heads = 6 if name == "t5" else 4
    assert cross.shape == (3, heads, 23, 19)
    assert bool((cross[1, :, :, 4:] == 0).all())
    assert torch.allclose(cross.sum(-1), torch.ones(3, heads, 23), atol=1e-5)
    assert seen["decoder.layers.0.cross.k"].shape[:2] == (3, 19)


def test_interventions_reach_encoder_decoder_and_cross_attention() -> None:
    ours = ours_of(peer_of("bart"))
    with torch.no_grad():
        plain = ours(SOURCE_BS, TARGET_BL)
        for site in ("encoder.layers.1.resid_post", "decoder.layers.1.cross.z", "decoder.layers.1.cross.k", "logits"):
            with bildung.intervene(ours, {site: lambda x: x}):
                assert torch.equal(ours(SOURCE_BS, TARGET_BL), plain)
            with bildung.intervene(ours, {site: torch.zeros_like}):
                assert not torch.allclose(ours(SOURCE_BS, TARGET_BL), plain)


def unmasked(self: attention.Memory) -> attention.Mask:
    return attention.Mask(None, causal=False)


def interleaved(positions_BL: Tensor, size: int, *, halves: bool = False) -> Tensor:
    return SINUSOIDAL(positions_BL, size)


SINUSOIDAL = positions.sinusoidal


@pytest.mark.parametrize(
    "mutant",
    [
        "cross mask",
        "scaled scores",
        "one-sided buckets",
        "no division",
        "position offset",
        "embedding norm",
        "logits bias",
        "embedding scale",
        "interleaved sinusoids",
        "swapped norms",
    ],
)
def test_mutants_fail(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = {
        "cross mask": "t5",
        "scaled scores": "t5",
        "one-sided buckets": "t5",
        "no division": "t5",
        "position offset": "bart",
        "embedding norm": "bart",
        "logits bias": "marian",
        "embedding scale": "bart-scaled",
        "interleaved sinusoids": "marian",
        "swapped norms": "bart",
    }[mutant]
    peer = peer_of(family)
    ours = ours_of(peer)
    if mutant == "cross mask":
        monkeypatch.setattr(attention.Memory, "mask", property(unmasked))
    elif mutant == "scaled scores":
        for block in ours.decoder.layers:
            block.cross_attn.scale = 10**-0.5
    elif mutant == "one-sided buckets":
        ours.encoder.bias.causal = True
    elif mutant == "no division":
        object.__setattr__(ours.config, "logit_scale", 1.0)
    elif mutant == "position offset":
        ours.encoder.embed_positions.offset = 0
    elif mutant == "embedding norm":
        ours.decoder.embed_norm = None
    elif mutant == "logits bias":
        ours.final_logits_bias.data.zero_()
    elif mutant == "embedding scale":
        object.__setattr__(ours.config.encoder, "embed_scale", 1.0)
    elif mutant == "interleaved sinusoids":
        monkeypatch.setattr(positions, "sinusoidal", interleaved)
    else:
        for block in ours.decoder.layers:
            block.input_layernorm, block.cross_layernorm = block.cross_layernorm, block.input_layernorm
    assert worst(peer, ours, KEEP_BS)[1] > 1e-3


def test_a_bare_bart_directory_is_read_and_stays_one(tmp_path: Path) -> None:
    """facebook/bart-base is one: names without `model.`, and no final_logits_bias."""
    peer = transformers.BartModel(transformers.BartConfig(**BART)).eval()
    peer.save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save(tmp_path / "bare")
    lm = bildung.load(tmp_path / "bare")
    with torch.no_grad():
        states = peer(input_ids=SOURCE_BS, decoder_input_ids=TARGET_BL).last_hidden_state
        assert float((states - lm.model.given(SOURCE_BS).hidden(TARGET_BL)).abs().max()) < 1e-5
    bildung.save(lm, tmp_path / "ours")
    again = transformers.BartModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in peer.state_dict().items())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("t5", "feed_forward_proj", "double-gelu"),
        ("t5", "relative_attention_num_buckets", 6),
        ("t5", "is_decoder", True),
        ("bart", "tie_word_embeddings", False),
        ("bart", "encoder_layerdrop", 0.1),
        ("bart", "normalize_before", True),
        ("bart", "encoder_attention_heads", 5),
        ("marian", "share_encoder_decoder_embeddings", False),
        ("marian", "decoder_vocab_size", 17),
        ("marian", "surprise", 1),
    ],
)
def test_what_is_not_built_is_refused(name: str, key: str, value: Any) -> None:
    raw = json.loads(peer_of(name).config.to_json_string(use_diff=False))
    with pytest.raises(ConfigError):
        from_dict({**raw, key: value})


def test_an_empty_source_and_a_wrong_number_of_sources_are_errors() -> None:
    ours = ours_of(peer_of("t5"))
    with pytest.raises(DataError, match="real token"):
        ours.encode(SOURCE_BS, torch.zeros(3, 19, dtype=torch.bool))
    with pytest.raises(DataError, match="2 target rows were given for 3 sources"):
        ours(SOURCE_BS, TARGET_BL[:2])

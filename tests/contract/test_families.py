"""What every family must do, whatever it is: one row per file in bildung/model/families.

A new family is a new line in CONFIGS. It is then saved and loaded bit-equal, built the same from the same seed, watched
at every site, patched with its own activations, decoded with a cache, tuned by LoRA, quantized, run in bfloat16,
compiled, and asked to refuse a key it does not know.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import bildung
from bildung.core.errors import ConfigError
from bildung.model.base import CausalLM
from bildung.model.build import build
from bildung.model.config import MODEL_TYPES, from_dict
from bildung.model.linear import match_linears, replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import METHODS
from bildung.model.store import LanguageModel, no_tokenizer
from bildung.model.taps import intervene, observe
from tests.model.tiny import tiny_lm

SPECIAL = dict(vocab_size=260, bos_token_id=256, eos_token_id=257, pad_token_id=258)
START = dict(SPECIAL, decoder_start_token_id=258)
# Every dimension has another size.
COMMON = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80, initializer_range=0.2)
LLAMA = dict(SPECIAL, **COMMON, num_key_value_heads=2, max_position_embeddings=64)
ENCODER = dict(SPECIAL, **COMMON, max_position_embeddings=64)
VIT = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, image_size=[8, 12], patch_size=4)
BART = dict(
    START, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6, decoder_attention_heads=4,
    encoder_ffn_dim=80, decoder_ffn_dim=72, max_position_embeddings=64, init_std=0.2,
)  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "bart": dict(BART, forced_eos_token_id=257),
    "bert": dict(ENCODER, architectures=["BertForPreTraining"]),
    "bildung": dict(
        LLAMA, norm="layer", norm_placement="sandwich", positions="alibi", windows=[None, 4], attention_sinks=True,
        qk_norm=True, hidden_act="gelu",
    ),
    "dinov2": dict(VIT, mlp_ratio=2, layerscale_value=0.7),
    "dinov2_with_registers": dict(VIT, mlp_ratio=2, num_register_tokens=3),
    "distilbert": dict(
        SPECIAL, dim=48, n_layers=2, n_heads=6, hidden_dim=80, max_position_embeddings=64, initializer_range=0.2,
        architectures=["DistilBertForMaskedLM"],
    ),
    "gemma3_text": dict(LLAMA, head_dim=10, sliding_window=4, sliding_window_pattern=2, query_pre_attn_scalar=12),
    "gpt2": dict(SPECIAL, n_embd=48, n_layer=2, n_head=6, n_inner=80, n_positions=64, initializer_range=0.2),
    "gpt_neox": dict(SPECIAL, **COMMON, rotary_pct=0.5, max_position_embeddings=64),
    "llama": LLAMA,
    "marian": dict(BART, pad_token_id=258, num_hidden_layers=2),
    "mistral": dict(LLAMA, sliding_window=4),
    "qwen2": LLAMA,
    "qwen3": dict(LLAMA, head_dim=10),
    "rnn": dict(SPECIAL, cell="lstm", hidden_size=48, embedding_size=40, num_hidden_layers=2),
    "rnn_seq2seq": dict(START, hidden_size=48, embedding_size=40, encoder_size=20, attention="bahdanau"),
    "roberta": dict(ENCODER, architectures=["RobertaForMaskedLM"], pad_token_id=1),
    "t5": dict(START, d_model=48, d_kv=10, d_ff=80, num_layers=2, num_heads=6),
    "transformer": dict(
        START, hidden_size=48, intermediate_size=80, encoder_layers=2, decoder_layers=2, num_attention_heads=6
    ),
    "vit": dict(
        VIT, intermediate_size=80, architectures=["ViTForImageClassification"],
        id2label={str(i): str(i) for i in range(9)},
    ),
}  # fmt: skip
KINDS = {name: from_dict({"model_type": name, **raw}).kind for name, raw in CONFIGS.items()}
RECURRENT = ("recurrent", "seq2seq")
PAIRED = ("encoder-decoder", "seq2seq")
CAUSAL = [name for name, kind in KINDS.items() if kind in ("decoder", "recurrent", *PAIRED)]


def test_no_family_is_forgotten() -> None:
    assert set(CONFIGS) == set(MODEL_TYPES)


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(family: str, seed: int = 3) -> LanguageModel:
    config = from_dict({"model_type": family, **CONFIGS[family]})
    model = build(config, seed).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():  # ones and zeros would hide what is left out or swapped
        if parameter.ndim == 1 and "running" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    tokenizer = no_tokenizer(config) if config.kind == "vision" else tiny_lm().tokenizer
    return LanguageModel(model, tokenizer, config)


SOURCE = torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(3, 250, (2, 11), generator=torch.Generator().manual_seed(2))
PIXELS = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(3))


def inputs(model: Any) -> tuple[Tensor, ...]:
    if model.config.kind == "vision":
        return (PIXELS,)
    return (SOURCE, TARGET) if model.config.kind in PAIRED else (TARGET,)


def run(model: Any) -> Tensor:
    """Logits; of a model without a head the last states."""
    if model.config.kind == "vision" and model.classifier is None:
        return model.hidden(PIXELS)
    return model(*inputs(model))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)


def equal(a: Tensor, b: Tensor, family: str) -> None:
    """Bit for bit; to rounding where torch's recurrent kernels round by where in memory a matrix lies."""
    if KINDS[family] in RECURRENT:
        close(a, b)
    else:
        assert torch.equal(a, b)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_saved_and_loaded_bit_equal(family: str, tmp_path: Path) -> None:
    lm = made(family)
    out = bildung.save(lm, tmp_path / "out")
    again = bildung.load(out)
    equal(run(again.model), run(lm.model), family)
    first, second = dict(lm.model.named_parameters()), dict(again.model.named_parameters())
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    twice = bildung.save(again, tmp_path / "twice")
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (twice / name).read_bytes(), name


def test_the_same_seed_gives_the_same_model(family: str) -> None:
    config = from_dict({"model_type": family, **CONFIGS[family]})
    first, again, other = (dict(build(config, seed).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert all(torch.isfinite(parameter).all() for parameter in first.values())


def test_an_unknown_key_is_refused_with_the_nearest(family: str) -> None:
    raw = {"model_type": family, **CONFIGS[family]}
    known = next(key for key in raw if key not in SPECIAL and key != "architectures" and len(key) > 5)
    with pytest.raises(ConfigError, match=rf"unknown key '{known}x'.*did you mean.*'{known}'"):
        from_dict({**raw, f"{known}x": 3})


# ── taps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def expected_shape(site: str, model: Any, letters: str) -> tuple[int, ...]:
    """What the letters of a site mean in this model, as documented in taps.sites."""
    config = model.config
    crosses, encodes = ".cross." in site, site.startswith("encoder.")
    own = config.encoder if encodes and getattr(config, "encoder", None) is not None else config
    paired = config.kind in PAIRED
    length = {"vision": 0}.get(config.kind, SOURCE.shape[1] if encodes and paired else TARGET.shape[1])
    sizes = {
        "B": 2,
        "L": length,
        "S": SOURCE.shape[1] if crosses and paired else length,
        "D": own.hidden_size,
        "V": config.vocab_size,
        "E": getattr(config, "embedding_size", 0),
        "A": getattr(config, "attention_size", 0),
        "M": getattr(config, "memory_size", 0),
    }
    if config.kind == "seq2seq":
        read = config.embedding_size + (config.memory_size if config.attention == "bahdanau" else 0)
        sizes |= {"S": SOURCE.shape[1], "K": config.encoder_size, "R": read}
    if hasattr(own, "head_dim"):
        sizes |= {"N": own.num_attention_heads, "K": own.num_key_value_heads, "H": own.head_dim}
        sizes |= {"F": own.intermediate_size, "C": own.num_labels}
    if config.kind == "vision":
        rows, columns = config.image.grid
        sizes["P"] = rows * columns
        registers = 0 if site == "pos_embed" else config.image.registers  # they join after the positions
        sizes["L"] = sizes["S"] = rows * columns + 1 + registers
    found = [re.fullmatch(r"(\d*)(\w)", word) for word in letters.split()]
    return tuple(int(one.group(1) or 1) * sizes[one.group(2)] for one in found if one is not None)


def test_every_site_is_there_with_its_shape_and_its_own_activation_changes_nothing(family: str) -> None:
    model = made(family).model
    with observe(model, "*") as seen:
        watched = run(model)
    assert set(seen) == set(model.sites)
    for site, letters in model.sites.items():
        assert tuple(seen[site].shape) == expected_shape(site, model, letters), (site, letters)
    with intervene(model, {"*": lambda x: x.clone()}):
        assert torch.equal(run(model), watched)
    close(run(model), watched)  # nobody listens: kernels
    with intervene(model, {next(iter(model.sites)): lambda x: x + 0.5}):
        assert not torch.equal(run(model), watched)


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", CAUSAL)
def test_cached_equals_uncached_and_the_future_is_invisible(family: str) -> None:
    model = made(family).model
    lm: CausalLM = model.given(SOURCE) if model.config.kind in PAIRED else model
    with torch.no_grad():
        whole, cache = lm(TARGET), lm.kv_cache(2, 11)
        close(torch.cat([lm(piece, kv_cache=cache) for piece in TARGET.split([5, 1, 1, 4], dim=1)], 1), whole)
        changed = TARGET.clone()
        changed[:, 6] = 99
        close(lm(changed)[:, :6], whole[:, :6])
        assert (lm(changed)[:, 6:] - whole[:, 6:]).abs().amax() > 1e-3
    assert cache.length == 11


def test_activations_in_bfloat16(family: str) -> None:
    model = made(family).model
    exact = run(model)
    model.compute_dtype = torch.bfloat16
    rounded = run(model)
    assert rounded.dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    off = (rounded.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 0 < off < 0.1


# A compiler meets a family's code, not its name: each way to attend and each kind of stack once; the rest is slow.
COMPILED = ("bert", "bildung", "gpt2", "llama", "t5", "vit")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in COMPILED else pytest.mark.slow)
        for name, kind in KINDS.items()
        if kind not in RECURRENT
    ],
)
@torch.no_grad()
def test_compiled_equals_eager(family: str) -> None:
    """The graph is captured and taken apart; the code generator behind it is torch's business. (A loop over tokens, as
    recurrent models have, is not for compiling.)"""
    model = made(family).model
    forward = model.hidden if KINDS[family] == "vision" else model.forward
    torch.compiler.reset()
    counters.clear()
    close(torch.compile(forward, backend="aot_eager")(*inputs(model)), forward(*inputs(model)))
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was captured: this ran eagerly"


# ── tuning and quantizing ───────────────────────────────────────────────────────────────────────────────────────────


def test_lora_starts_at_the_model_and_trains(family: str) -> None:
    model = made(family).model
    model.requires_grad_(False)  # first: attention's kernels differ by whether a bias on the scores is learned
    before = run(model)
    for linear in match_linears(model, "all").values():
        linear.deltas["lora"] = LowRank(linear.in_features, linear.out_features, 2, 2.0)
    equal(run(model), before, family)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        out = run(model)
        loss = nn.functional.cross_entropy(out.flatten(0, -2), torch.ones(out[..., 0].numel(), dtype=torch.long))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained) > len(trained) / 2


@pytest.mark.parametrize("method", METHODS)
def test_quantized_saved_and_loaded_bit_equal(family: str, method: str, tmp_path: Path) -> None:
    lm = made(family)
    exact = run(lm.model)
    names = replace_stores(lm.model, "all", lambda one: METHODS[method].quantize(one.base.dense().detach()))
    rounded = run(lm.model)
    off = (rounded - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 0 < off < (0.5 if method == "nf4" else 0.1)
    again = bildung.load(bildung.save(lm, tmp_path / "out")).model
    assert all(type(again.linears()[name].base) is METHODS[method] for name in names)
    assert torch.equal(run(again), rounded)

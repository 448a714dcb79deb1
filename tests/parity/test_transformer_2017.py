"""The 2017 Transformer equals one put together from torch.nn's layers and the paper's formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import bildung
from bildung.core.errors import ConfigError
from bildung.model import transformer
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel, state_tensors
from tests.conftest import tiny_tokenizer

CONFIG: dict[str, Any] = dict(
    model_type="transformer",
    vocab_size=311,
    hidden_size=48,
    intermediate_size=80,
    encoder_layers=2,
    decoder_layers=3,
    num_attention_heads=6,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
SOURCE_BS = torch.randint(3, 100, (3, 19), generator=torch.Generator().manual_seed(1))
TARGET_BL = torch.randint(3, 100, (3, 23), generator=torch.Generator().manual_seed(2))
KEEP_BS = torch.arange(19)[None] < torch.tensor([[19], [4], [11]])


def ours(**changes: Any) -> Any:
    model = build(from_dict({**CONFIG, **changes}), seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.normal_(1.0, 0.3, generator=generator)
    return model


def set_attention(theirs: nn.MultiheadAttention, mine: Any) -> None:
    theirs.in_proj_weight.data = torch.cat([one.weight() for one in (mine.q_proj, mine.k_proj, mine.v_proj)])
    theirs.out_proj.weight.data = mine.o_proj.weight()
    theirs.in_proj_bias.data.zero_()
    theirs.out_proj.bias.data.zero_()


def set_rest(theirs: Any, mine: Any, norms: dict[str, nn.Module]) -> None:
    set_attention(theirs.self_attn, mine.self_attn)
    for linear, own in ((theirs.linear1, mine.mlp.up_proj), (theirs.linear2, mine.mlp.down_proj)):
        linear.weight.data, linear.bias.data = own.weight(), own.bias
    for name, norm in norms.items():
        getattr(theirs, name).load_state_dict(norm.state_dict())


def with_positions(embedding: Tensor, tokens: Tensor) -> Tensor:
    """Section 3.4 and 3.5: E sqrt(d) + PE, element by element."""
    x = embedding[tokens] * math.sqrt(48)
    for pos in range(tokens.shape[1]):
        for i in range(24):
            angle = pos / 10000 ** (2 * i / 48)
            x[:, pos, 2 * i] += math.sin(angle)
            x[:, pos, 2 * i + 1] += math.cos(angle)
    return x


@torch.no_grad()
def reference(model: Any) -> Tensor:
    """Logits by torch.nn.Transformer{En,De}coderLayer."""
    shape = dict(d_model=48, nhead=6, dim_feedforward=80, dropout=0.0, batch_first=True, layer_norm_eps=1e-6)
    embedding = model.shared.weight
    memory = with_positions(embedding, SOURCE_BS)
    for block in model.encoder.layers:
        layer = nn.TransformerEncoderLayer(**shape).train()  # in evaluation torch takes a fused path of its own
        set_rest(layer, block, {"norm1": block.input_layernorm, "norm2": block.post_attention_layernorm})
        memory = layer(memory, src_key_padding_mask=~KEEP_BS)
    y = with_positions(embedding, TARGET_BL)
    causal = torch.ones(23, 23, dtype=torch.bool).triu(1)
    for block in model.decoder.layers:
        layer = nn.TransformerDecoderLayer(**shape).train()
        norms = {
            "norm1": block.input_layernorm,
            "norm2": block.cross_layernorm,
            "norm3": block.post_attention_layernorm,
        }
        set_rest(layer, block, norms)
        set_attention(layer.multihead_attn, block.cross_attn)
        y = layer(y, memory, tgt_mask=causal, memory_key_padding_mask=~KEEP_BS)
    return y @ embedding.T


def worst(model: Any) -> float:
    with torch.no_grad():
        logits = model(SOURCE_BS, TARGET_BL, source_keep_BS=KEEP_BS)
    return float((logits - reference(model)).abs().max())


def test_it_equals_torchs_layers_and_the_papers_formulas() -> None:
    assert worst(ours()) < 1e-5


@pytest.mark.parametrize("mutant", ["halves", "pre-norm", "no scale", "gelu"])
def test_mutants_fail(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours()
    if mutant == "halves":
        model.decoder.embed_positions.kind = "sinusoidal_halves"
    elif mutant == "pre-norm":
        for block in model.encoder.layers:
            block.post = False
    elif mutant == "no scale":
        object.__setattr__(model.config, "embed_scale", 1.0)
    else:
        for block in model.decoder.layers:
            block.mlp.act = nn.functional.gelu
    assert worst(model) > 1e-3


def test_one_matrix_serves_source_target_and_softmax() -> None:
    model = build(from_dict(CONFIG))
    assert model.lm_head.base.weight is model.shared.weight is model.encoder.embed_tokens.weight
    assert "lm_head.weight" not in state_tensors(model)
    untied = build(from_dict({**CONFIG, "tie_word_embeddings": False}))
    assert untied.lm_head.base.weight is not untied.shared.weight


def test_the_papers_base_model_has_its_sizes() -> None:
    """Table 3 gives 65 million parameters for the base model and its 37,000 shared tokens."""
    config = from_dict({"model_type": "transformer", "vocab_size": 37000, "bos_token_id": 0, "eos_token_id": 1})
    with torch.device("meta"):
        model = transformer_class()(config)
    assert 62e6 < sum(parameter.numel() for parameter in model.parameters()) < 66e6
    assert (config.num_hidden_layers, config.encoder.num_hidden_layers, config.residual_dropout) == (6, 6, 0.1)


def transformer_class() -> Any:
    from bildung.model.encoder_decoder import EncoderDecoder

    return EncoderDecoder


def test_starting_weights_are_xaviers_and_embeddings_have_length_one() -> None:
    model = build(from_dict({**CONFIG, "hidden_size": 96}), seed=1)
    weight = model.encoder.layers[0].mlp.up_proj.weight().detach()
    assert 0.95 * math.sqrt(6 / (96 + 80)) < float(weight.abs().max()) <= math.sqrt(6 / (96 + 80))
    assert float(model.shared.weight.detach().norm(dim=1).mean()) == pytest.approx(1.0, abs=0.05)


def test_dropout_stands_where_the_paper_puts_it() -> None:
    model = build(from_dict({**CONFIG, "dropout": 0.5}), seed=1).train()
    torch.manual_seed(0)
    with bildung.observe(model, ["encoder.layers.0.*", "decoder.layers.0.cross.probs"]) as seen:
        model(SOURCE_BS, TARGET_BL)
    zeros = float((seen["encoder.layers.0.resid_pre"] == 0).float().mean())
    assert zeros == pytest.approx(0.5, abs=0.03)  # on embeddings + positions
    probs = seen["decoder.layers.0.cross.probs"]
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))  # none on attention weights
    block = model.encoder.layers[0]
    torch.manual_seed(0)
    added = seen["encoder.layers.0.attn.out"]
    dropped = block._drop(added)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert isinstance(block, transformer.Block)


def test_its_directory_comes_back_and_peers_refuse_it(tmp_path: Path) -> None:
    model = ours()
    bildung.save(LanguageModel(model, tiny_tokenizer(), model.config), tmp_path / "model")
    again = bildung.load(tmp_path / "model").model
    for name, tensor in state_tensors(model).items():
        assert torch.equal(tensor, state_tensors(again)[name])
    with pytest.raises((ValueError, KeyError), match="transformer"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 5}, "5 attention heads"),
        ({"d_model": 48}, "d_model"),
        ({"eos_token_id": None}, "eos_token_id"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_dict({**CONFIG, **changes})

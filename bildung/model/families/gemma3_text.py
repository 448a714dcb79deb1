"""Gemma 3, the text model: five layers that look at a window for every one that sees all (arXiv 2503.19786).

    x + norm(attn(norm(x))),  x + norm(mlp(norm(x)))       sandwich norms, of which the files hold weight - 1
    q, k: RMSNorm per head (instead of Gemma 2's soft-cap), then RoPE: base 10,000 in the window, 1,000,000 elsewhere
    embeddings times sqrt(hidden_size), rounded to the type of the activations; tied

transformers' `attn_logit_softcapping` is refused unless null: it reads the key and does not apply it.
"""

from __future__ import annotations

from bildung.core.errors import ConfigError
from bildung.model.config import ModelConfig, Rope
from bildung.model.config_keys import ConfigKeys
from bildung.model.families.llama import KINDS, layer_kinds
from bildung.model.names import Names
from bildung.model.rope_keys import rope_from

ARCHITECTURE = "Gemma3ForCausalLM"


def config(keys: ConfigKeys) -> ModelConfig:
    """Defaults are transformers' (those of the 4B model), as its files leave out what equals them."""
    hidden_size, layers = keys.size("hidden_size", 2304), keys.size("num_hidden_layers", 26)
    keys.require("attn_logit_softcapping", None)
    keys.require("use_bidirectional_attention", False)  # EmbeddingGemma, an encoder
    keys.require("is_encoder_decoder", False)
    keys.take("cache_implementation", None)  # of generate()
    cap, bias = keys.number("final_logit_softcapping", 0.0), keys.flag("attention_bias", False)
    if cap < 0 or (scalar := keys.number("query_pre_attn_scalar", 256)) <= 0:
        raise ConfigError("config.json: final_logit_softcapping and query_pre_attn_scalar must be positive.")
    rope, local_rope = ropes(keys)
    return ModelConfig(
        model_type="gemma3_text",
        vocab_size=keys.size("vocab_size", 262208),
        hidden_size=hidden_size,
        intermediate_size=keys.size("intermediate_size", 9216),
        num_hidden_layers=layers,
        num_attention_heads=keys.size("num_attention_heads", 8),
        num_key_value_heads=keys.size("num_key_value_heads", 4),
        head_dim=keys.size("head_dim", 256),
        max_position_embeddings=keys.size("max_position_embeddings", 131072),
        norm_eps=float(keys.number("rms_norm_eps", 1e-6)),
        norm_offset=1.0,
        norm_placement="sandwich",
        hidden_act=keys.take("hidden_activation", "gelu_pytorch_tanh"),
        rope=rope,
        local_rope=local_rope,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        attention_scale=scalar**-0.5,
        logit_softcap=float(cap) or None,
        windows=windows(keys, layers),
        embed_scale=hidden_size**0.5,
        attention_dropout=float(keys.number("attention_dropout", 0.0)),
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
        initializer_range=float(keys.number("initializer_range", 0.02)),
        **keys.special_tokens(),
    )


def ropes(keys: ConfigKeys) -> tuple[Rope, Rope]:
    """RoPE of the layers that see all (which alone may be stretched) and of those with a window. transformers 5 gives
    `rope_parameters` per kind of layer; before it, there were rope_theta, rope_scaling and rope_local_base_freq."""
    theta, local_theta = keys.number("rope_theta", 1e6), keys.number("rope_local_base_freq", 1e4)
    given, scaling = keys.take("rope_parameters", {}), keys.take("rope_scaling", {})
    objects = (given, scaling, *(given.values() if isinstance(given, dict) else ()))
    if not all(isinstance(one, dict | None) for one in objects) or set(given) - set(KINDS):
        raise ConfigError(f"config.json: rope_parameters of Gemma 3 has an object for each of {', '.join(KINDS)}.")
    context = keys.raw.get("max_position_embeddings", 131072)
    made = []
    for kind, base, more in (("full_attention", theta, scaling), ("sliding_attention", local_theta, {})):
        one = {"rope_theta": base, **(given.get(kind) or {}), **more}
        made.append(rope_from(ConfigKeys({"rope_parameters": one, "max_position_embeddings": context})))
    return made[0], made[1]


def windows(keys: ConfigKeys, layers: int) -> tuple[int | None, ...]:
    """Every sixth layer sees all, or as `sliding_window_pattern` or the newer `layer_types` say."""
    window = keys.size("sliding_window", 4096)
    pattern = keys.size("_sliding_window_pattern", 6)
    pattern = keys.size("sliding_window_pattern", pattern)
    kinds = layer_kinds(keys, [KINDS[0] if (i + 1) % pattern else KINDS[1] for i in range(layers)])
    if "sliding_window" in keys.raw and keys.raw["sliding_window"] is None and KINDS[0] in kinds:
        raise ConfigError("config.json: layer_types names layers with a window, and sliding_window is null.")
    return tuple(window if kind == KINDS[0] else None for kind in kinds)


def names(config: ModelConfig) -> Names:
    """Four norms per layer, named for where they stand."""
    own = "model.layers.*"
    return {
        f"{own}.attn_out_layernorm": f"{own}.post_attention_layernorm",
        f"{own}.post_attention_layernorm": f"{own}.pre_feedforward_layernorm",
        f"{own}.mlp_out_layernorm": f"{own}.post_feedforward_layernorm",
    }

"""GPT-NeoX and Pythia: attention and feed-forward side by side, RoPE on a part of each head (Black et al. 2022).

    x + attn(norm1(x)) + mlp(norm2(x))        `use_parallel_residual`; Pythia (Biderman et al. 2023, arXiv 2304.01373)

Its files keep q, k and v of each head together in one matrix: q0 k0 v0 q1 k1 v1 ... (arXiv 2204.06745). Of the biases
`attention_bias` rules those of attention; the feed-forward always has its own.
"""

from __future__ import annotations

from dataclasses import replace

from bildung.core.errors import ConfigError
from bildung.model.config import ModelConfig, Rope
from bildung.model.config_keys import ConfigKeys, is_number, per_head
from bildung.model.names import Names, Stored
from bildung.model.rope_keys import rope_from

ARCHITECTURE = "GPTNeoXForCausalLM"
REPEATED = ("*.attention.bias", "*.attention.masked_bias", "embed_out.weight")  # the mask as a buffer; a tied matrix
MODULES = {"lm_head": "lm_head"}  # transformers' module, which its files call embed_out


def config(keys: ConfigKeys) -> ModelConfig:
    """`rotary_pct`, since transformers 5 `rope_parameters.partial_rotary_factor`: the share of a head that turns."""
    hidden_size, heads = keys.size("hidden_size", 6144), keys.size("num_attention_heads", 64)
    head_dim = per_head(hidden_size, heads)
    rope, share = partial_rope(keys)
    bias, dropout = keys.flag("attention_bias", True), float(keys.number("hidden_dropout", 0.0))
    tied = keys.flag("tie_word_embeddings", False)
    keys.require("is_decoder", False, True)  # causal either way
    keys.require("is_encoder_decoder", False)
    keys.take("classifier_dropout", None)  # of a head that is not built here
    for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        keys.require(name, 0)  # GPT-NeoX-20B says them, and no class reads them
    return ModelConfig(
        model_type="gpt_neox",
        vocab_size=keys.size("vocab_size", 50432),
        hidden_size=hidden_size,
        intermediate_size=keys.size("intermediate_size", 24576),
        num_hidden_layers=keys.size("num_hidden_layers", 44),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=keys.size("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=float(keys.number("layer_norm_eps", 1e-5)),
        parallel_residual=keys.flag("use_parallel_residual", True),
        hidden_act=keys.take("hidden_act", "gelu"),
        gated=False,
        rope=rope,
        rotary_dim=int(head_dim * share),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        tie_word_embeddings=tied,
        embed_dropout=dropout,
        residual_dropout=dropout,
        attention_dropout=float(keys.number("attention_dropout", 0.0)),
        initializer_range=float(keys.number("initializer_range", 0.02)),
        **keys.special_tokens(),
    )


def partial_rope(keys: ConfigKeys) -> tuple[Rope, float]:
    """RoPE, and the share of each head's dimensions that it turns."""
    base, share = keys.number("rotary_emb_base", 10000.0), keys.number("rotary_pct", 0.25)
    given = keys.raw.get("rope_parameters") or keys.raw.get("rope_scaling") or {}
    if isinstance(given, dict):
        share = given.get("partial_rotary_factor", share)
        base = given.get("rope_theta", keys.raw.get("rope_theta", base))
        for name in ("rope_parameters", "rope_scaling"):
            if keys.left.get(name):
                keys.left[name] = {k: v for k, v in keys.left[name].items() if k != "partial_rotary_factor"}
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"config.json: partial_rotary_factor = {share!r}; the share that turns lies in (0, 1].")
    if not is_number(base):
        raise ConfigError(f"config.json: rotary_emb_base = {base!r}; it must be a number.")
    return replace(rope_from(keys), theta=float(base)), float(share)


def names(config: ModelConfig) -> Names:
    """One matrix for q, k and v, ordered head by head."""
    block, own = "gpt_neox.layers.*", "model.layers.*"
    fused = {
        f"{own}.self_attn.{name}": Stored(
            f"{block}.attention.query_key_value", part, 3, heads=config.num_attention_heads
        )
        for part, name in enumerate(("q_proj", "k_proj", "v_proj"))
    }
    return {
        "model.embed_tokens": "gpt_neox.embed_in",
        f"{own}.input_layernorm": f"{block}.input_layernorm",
        **fused,
        f"{own}.self_attn.o_proj": f"{block}.attention.dense",
        f"{own}.post_attention_layernorm": f"{block}.post_attention_layernorm",
        f"{own}.mlp.up_proj": f"{block}.mlp.dense_h_to_4h",
        f"{own}.mlp.down_proj": f"{block}.mlp.dense_4h_to_h",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    }

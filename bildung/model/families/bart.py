"""BART: the 2017 encoder-decoder with learned positions and GELU, trained to repair damaged text (Lewis et al. 2019,
arXiv 1910.13461).

Post-norm, biases everywhere, a LayerNorm on the embeddings. The table of positions begins with two rows that nobody
uses (fairseq counted from the padding id). `final_logits_bias` is a buffer of the file, kept and never trained.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys, per_head
from bildung.model.names import Names

REPEATED = (
    "lm_head.weight",
    "*embed_tokens.weight",  # both stacks read the shared one
    "*coder.version",  # fairseq's, in old files
)


def ARCHITECTURE(config: ModelConfig) -> str:
    """A directory of the bare model (facebook/bart-base is one) stays one: the unembedding is the embedding anyway."""
    return "BartForConditionalGeneration" if config.logits_bias else "BartModel"


def config(keys: ConfigKeys) -> ModelConfig:
    """BART."""
    common = shared_keys(keys, vocab_size=50265, bos=0, pad=1, eos=2)
    keys.require("normalize_embedding", True)
    keys.require("static_position_embeddings", False)
    bare = keys.architecture("BartForConditionalGeneration", "BartModel") == "BartModel"
    positions = {"positions": "learned", "position_offset": 2}
    start = common["eos_token_ids"][0]
    return with_encoder(keys, start=start, **common, **positions, embed_norm=True, logits_bias=not bare)


def shared_keys(keys: ConfigKeys, *, vocab_size: int, bos: int | None, pad: int, eos: int) -> dict[str, Any]:
    """The keys that BART and Marian share, with the defaults in which they differ."""
    hidden_size = keys.size("d_model", 1024)
    keys.require("is_encoder_decoder", True)
    keys.require("is_decoder", False)
    keys.require("tie_word_embeddings", True)
    # What fairseq's older models had and neither of the two has.
    keys.require("normalize_before", False)
    keys.require("add_final_layer_norm", False)
    keys.require("add_bias_logits", False)
    keys.require("encoder_layerdrop", 0.0)
    keys.require("decoder_layerdrop", 0.0)
    for name in ("classifier_dropout", "classif_dropout", "num_hidden_layers", "extra_pos_embeddings"):
        keys.take(name, None)  # of heads that are not built here; said elsewhere; always 2
    special = keys.special_tokens()
    dropout = keys.number("dropout", 0.1)
    return {
        "model_type": keys.raw["model_type"],
        "vocab_size": keys.size("vocab_size", vocab_size),
        "hidden_size": hidden_size,
        "max_position_embeddings": keys.size("max_position_embeddings", 1024),
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_placement": "post",
        "final_norm": False,
        "hidden_act": keys.take("activation_function", "gelu"),
        "gated": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "embed_scale": math.sqrt(hidden_size) if keys.flag("scale_embedding", False) else 1.0,
        "tie_word_embeddings": True,
        "embed_dropout": dropout,
        "residual_dropout": dropout,
        "attention_dropout": keys.number("attention_dropout", 0.0),
        "activation_dropout": keys.number("activation_dropout", 0.0),
        "initializer_range": keys.number("init_std", 0.02),
        "bos_token_id": bos if special["bos_token_id"] is None else special["bos_token_id"],
        "eos_token_ids": special["eos_token_ids"] or (eos,),
        "pad_token_id": pad if special["pad_token_id"] is None else special["pad_token_id"],
    }


def with_encoder(keys: ConfigKeys, *, start: int, **common: Any) -> ModelConfig:
    """The decoder's stack with the encoder's in it: layers, heads and inner size of each are its own. start: the token
    that decoding starts from where the file does not say it."""

    def stack(name: str, **more: Any) -> ModelConfig:
        heads = keys.size(f"{name}_attention_heads", 16)
        return ModelConfig(
            **{**common, **more},
            kind="encoder-decoder",
            intermediate_size=keys.size(f"{name}_ffn_dim", 4096),
            num_hidden_layers=keys.size(f"{name}_layers", 12),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=per_head(common["hidden_size"], heads),
        )

    given = keys.token_ids("decoder_start_token_id") or (start,)
    encoder = stack("encoder", causal=False)
    return replace(stack("decoder", cross=True), encoder=encoder, decoder_start_token_id=given[0])


def names(config: ModelConfig) -> Names:
    """Both stacks under `model.`, except in a directory of the bare model."""
    prefix = "model." if config.logits_bias else ""
    found = {"shared": f"{prefix}shared"}
    for stack in ("encoder", "decoder"):
        own, file = f"{stack}.layers.*", f"{prefix}{stack}.layers.*"
        found |= {
            f"{stack}.embed_positions": f"{prefix}{stack}.embed_positions",
            f"{stack}.embed_norm": f"{prefix}{stack}.layernorm_embedding",
            f"{own}.input_layernorm": f"{file}.self_attn_layer_norm",
            f"{own}.cross_layernorm": f"{file}.encoder_attn_layer_norm",
            f"{own}.post_attention_layernorm": f"{file}.final_layer_norm",
            f"{own}.mlp.up_proj": f"{file}.fc1",
            f"{own}.mlp.down_proj": f"{file}.fc2",
        }
        for module, name in (("self_attn", "self_attn"), ("cross_attn", "encoder_attn")):
            found |= {f"{own}.{module}.{letter}_proj": f"{file}.{name}.{letter}_proj" for letter in "qkv"}
            found[f"{own}.{module}.o_proj"] = f"{file}.{name}.out_proj"
    return found

"""BERT: post-norm, learned positions, segment vectors, GELU (Devlin et al. 2019, arXiv 1810.04805).

MiniLM (Wang et al. 2020) and most sentence encoders are BERTs too. Read with any of its heads: see CLASSES.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys, per_head
from bildung.model.encoder_files import EncoderFiles
from bildung.model.names import Names

FILES = EncoderFiles(
    classes={
        "BertModel": ("pooler",),
        "BertForMaskedLM": ("mlm",),
        "BertForPreTraining": ("pooler", "mlm", "nsp"),
        "BertForNextSentencePrediction": ("pooler", "nsp"),
        "BertForSequenceClassification": ("pooler", "classify"),
        "BertForTokenClassification": ("tag",),
    },
    prefix="bert.",
    body=("embeddings.", "encoder.", "pooler."),
    marks={"pooler": "pooler.", "mlm": "cls.predictions.transform.", "nsp": "cls.seq_relationship."},
    biases=("cls.predictions.bias", "cls.predictions.decoder.bias"),
)
ARCHITECTURE = FILES.architecture
# The tied matrix, its bias a second time, and the numbers 0, 1, 2 ... as a buffer
REPEATED = ("cls.predictions.decoder.*", "cls.predictions.bias", "*embeddings.position_ids")


def present(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the file holds besides what config.json says (see encoder_files.py)."""
    return FILES.present(config, tensors)


def encoder_keys(keys: ConfigKeys) -> dict[str, Any]:
    """The keys that BERT and RoBERTa share."""
    hidden_size, heads = keys.size("hidden_size", 768), keys.size("num_attention_heads", 12)
    dropout = float(keys.number("hidden_dropout_prob", 0.1))
    keys.require("is_decoder", False)
    keys.require("add_cross_attention", False)
    keys.require("is_encoder_decoder", False)
    keys.require("position_embedding_type", "absolute")
    keys.take("gradient_checkpointing", None)  # how to train in less memory, not what is computed
    return {
        "model_type": keys.raw["model_type"],
        "kind": "encoder",
        "vocab_size": keys.size("vocab_size", 30522),
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("intermediate_size", 3072),
        "num_hidden_layers": keys.size("num_hidden_layers", 12),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": per_head(hidden_size, heads),
        "max_position_embeddings": keys.size("max_position_embeddings", 512),
        **BLOCK,
        "norm_eps": float(keys.number("layer_norm_eps", 1e-12)),
        "hidden_act": keys.take("hidden_act", "gelu"),
        "token_types": keys.size("type_vocab_size", 2),
        "num_labels": keys.num_labels(),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", True),
        "embed_dropout": dropout,
        "residual_dropout": dropout,
        "attention_dropout": float(keys.number("attention_probs_dropout_prob", 0.1)),
        "classifier_dropout": float(keys.number("classifier_dropout", dropout)),
        "initializer_range": float(keys.number("initializer_range", 0.02)),
        **keys.special_tokens(),
    }


# What makes a block BERT's: everybody sees everybody, "Add & Norm", plain feed-forward, biases everywhere
BLOCK: dict[str, Any] = {
    "causal": False,
    "norm": "layer",
    "norm_placement": "post",
    "embed_norm": True,
    "final_norm": False,
    "positions": "learned",
    "gated": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
}


def config(keys: ConfigKeys) -> ModelConfig:
    """BERT's own keys; the `pooler_*` and `directionality` of Google's first files are fixed."""
    keys.require("pooler_type", "first_token_transform")
    keys.require("directionality", "bidi")
    for name in ("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"):
        keys.take(name, None)  # of a pooler that was never released
    return ModelConfig(**encoder_keys(keys), heads=FILES.heads(keys))


def body_names(prefix: str) -> Names:
    """Where everything below the heads lies; RoBERTa's files call it the same."""
    own, block = "model.layers.*", f"{prefix}encoder.layer.*"
    return {
        "model.embed_tokens": f"{prefix}embeddings.word_embeddings",
        "model.embed_positions": f"{prefix}embeddings.position_embeddings",
        "model.token_types": f"{prefix}embeddings.token_type_embeddings",
        "model.embed_norm": f"{prefix}embeddings.LayerNorm",
        f"{own}.self_attn.q_proj": f"{block}.attention.self.query",
        f"{own}.self_attn.k_proj": f"{block}.attention.self.key",
        f"{own}.self_attn.v_proj": f"{block}.attention.self.value",
        f"{own}.self_attn.o_proj": f"{block}.attention.output.dense",
        f"{own}.input_layernorm": f"{block}.attention.output.LayerNorm",
        f"{own}.mlp.up_proj": f"{block}.intermediate.dense",
        f"{own}.mlp.down_proj": f"{block}.output.dense",
        f"{own}.post_attention_layernorm": f"{block}.output.LayerNorm",
        "pooler.dense": f"{prefix}pooler.dense",
    }


def names(config: ModelConfig) -> Names:
    """Everything under "bert." but in the bare model, and the heads beside it."""
    return {
        **body_names(FILES.body_prefix(config)),
        "transform.dense": "cls.predictions.transform.dense",
        "transform.layernorm": "cls.predictions.transform.LayerNorm",
        "lm_head": "cls.predictions.decoder",
        "lm_head.bias": FILES.bias(config),
        "nsp_head": "cls.seq_relationship",
        "classifier.out_proj": "classifier",
        "tagger.out_proj": "classifier",
    }

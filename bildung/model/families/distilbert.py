"""DistilBERT: every second layer of BERT, no segment vectors, no pooler (Sanh et al. 2019, arXiv 1910.01108).

In training, dropout also falls on what attention adds to the stream, as in BERT; transformers' class leaves that out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys, per_head
from bildung.model.encoder_files import EncoderFiles
from bildung.model.families.bert import BLOCK
from bildung.model.names import Names

FILES = EncoderFiles(
    classes={
        "DistilBertModel": (),
        "DistilBertForMaskedLM": ("mlm",),
        "DistilBertForSequenceClassification": ("classify_relu",),
        "DistilBertForTokenClassification": ("tag",),
    },
    prefix="distilbert.",
    body=("embeddings.", "transformer."),
    marks={"mlm": "vocab_transform."},
    biases=("vocab_projector.bias", "vocab_projector.bias"),
)
ARCHITECTURE = FILES.architecture
# The tied matrix; waves, which follow from the config
REPEATED = ("vocab_projector.weight", "*embeddings.position_ids", "*embeddings.position_embeddings.weight")


def present(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the file holds besides what config.json says (see encoder_files.py)."""
    return FILES.present(config, tensors)


def config(keys: ConfigKeys) -> ModelConfig:
    """DistilBERT has its own words: dim, n_layers, n_heads, hidden_dim, activation."""
    hidden_size, n_heads = keys.size("dim", 768), keys.size("n_heads", 12)
    dropout = float(keys.number("dropout", 0.1))
    classifier_dropout = float(keys.number("seq_classif_dropout", 0.2))
    heads = FILES.heads(keys)
    keys.require("is_encoder_decoder", False)
    keys.take("tie_weights_", None)  # old files; the matrix was tied either way
    keys.take("qa_dropout", None)  # of a head that is not built here
    waves = keys.flag("sinusoidal_pos_embds", False)
    return ModelConfig(
        model_type="distilbert",
        kind="encoder",
        vocab_size=keys.size("vocab_size", 30522),
        hidden_size=hidden_size,
        intermediate_size=keys.size("hidden_dim", 4 * 768),
        num_hidden_layers=keys.size("n_layers", 6),
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        head_dim=per_head(hidden_size, n_heads),
        max_position_embeddings=keys.size("max_position_embeddings", 512),
        **{**BLOCK, "positions": "sinusoidal" if waves else "learned"},
        norm_eps=1e-12,
        hidden_act=keys.take("activation", "gelu"),
        heads=heads,
        num_labels=keys.num_labels(),
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
        embed_dropout=dropout,
        residual_dropout=dropout,
        attention_dropout=float(keys.number("attention_dropout", 0.1)),
        classifier_dropout=dropout if "tag" in heads else classifier_dropout,
        initializer_range=float(keys.number("initializer_range", 0.02)),
        **keys.special_tokens(),
    )


def names(config: ModelConfig) -> Names:
    """Everything under "distilbert." but in the bare model, and the heads beside it."""
    prefix = FILES.body_prefix(config)
    own, block = "model.layers.*", f"{prefix}transformer.layer.*"
    return {
        "model.embed_tokens": f"{prefix}embeddings.word_embeddings",
        "model.embed_positions": f"{prefix}embeddings.position_embeddings",
        "model.embed_norm": f"{prefix}embeddings.LayerNorm",
        **{f"{own}.self_attn.{one}_proj": f"{block}.attention.{one}_lin" for one in ("q", "k", "v")},
        f"{own}.self_attn.o_proj": f"{block}.attention.out_lin",
        f"{own}.input_layernorm": f"{block}.sa_layer_norm",
        f"{own}.mlp.up_proj": f"{block}.ffn.lin1",
        f"{own}.mlp.down_proj": f"{block}.ffn.lin2",
        f"{own}.post_attention_layernorm": f"{block}.output_layer_norm",
        "transform.dense": "vocab_transform",
        "transform.layernorm": "vocab_layer_norm",
        "lm_head": "vocab_projector",
        "classifier.dense": "pre_classifier",
        "classifier.out_proj": "classifier",
        "tagger.out_proj": "classifier",
    }

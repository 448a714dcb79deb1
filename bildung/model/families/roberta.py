"""RoBERTa: BERT trained longer on more text, without next-sentence prediction (Liu et al. 2019, arXiv 1907.11692).

What differs in the numbers: positions start at pad_token_id + 1 and count real tokens only; the masked-language head is
always GELU; a sentence is classified from <s> by a dense layer and tanh of its own, not by the pooler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from bildung.core.errors import ConfigError
from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys
from bildung.model.encoder_files import EncoderFiles
from bildung.model.families.bert import body_names, encoder_keys
from bildung.model.names import Names

FILES = EncoderFiles(
    classes={
        "RobertaModel": ("pooler",),
        "RobertaForMaskedLM": ("mlm",),
        "RobertaForSequenceClassification": ("classify_tanh",),
        "RobertaForTokenClassification": ("tag",),
    },
    prefix="roberta.",
    body=("embeddings.", "encoder.", "pooler."),
    marks={"pooler": "pooler.", "mlm": "lm_head.dense."},
    biases=("lm_head.bias", "lm_head.decoder.bias"),
)
ARCHITECTURE = FILES.architecture
REPEATED = ("lm_head.decoder.*", "lm_head.bias", "*embeddings.position_ids")


def present(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the file holds besides what config.json says (see encoder_files.py)."""
    return FILES.present(config, tensors)


def config(keys: ConfigKeys) -> ModelConfig:
    """BERT's keys with other defaults. Of max_position_embeddings, the first pad_token_id + 1 belong to no token."""
    for name, default in (("vocab_size", 50265), ("pad_token_id", 1), ("bos_token_id", 0), ("eos_token_id", 2)):
        keys.left.setdefault(name, default)
    made = ModelConfig(
        **encoder_keys(keys),
        heads=FILES.heads(keys),
        transform_act="gelu",
    )
    offset = (made.pad_token_id or 0) + 1
    if made.max_position_embeddings <= offset:
        raise ConfigError(
            f"config.json: max_position_embeddings = {made.max_position_embeddings}; the first {offset} rows stand "
            f"before position 0 (pad_token_id + 1), so more are needed."
        )
    return replace(made, position_offset=offset, max_position_embeddings=made.max_position_embeddings - offset)


def names(config: ModelConfig) -> Names:
    """BERT's names under "roberta."; the heads have their own."""
    return {
        **body_names(FILES.body_prefix(config)),
        "transform.dense": "lm_head.dense",
        "transform.layernorm": "lm_head.layer_norm",
        "lm_head": "lm_head.decoder",
        "lm_head.bias": FILES.bias(config),
        "tagger.out_proj": "classifier",
    }

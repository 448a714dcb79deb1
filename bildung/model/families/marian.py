"""Marian: the translation models of Helsinki-NLP (Junczys-Dowmunt et al. 2018, arXiv 1804.00344; OPUS-MT).

BART's layout without its norm on the embeddings, and with fixed sinusoids for positions: all sines in the first half
of the vector, all cosines in the second. The decoder starts from the padding token.
"""

from __future__ import annotations

from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys
from bildung.model.families import bart
from bildung.model.families.bart import names

__all__ = ["ARCHITECTURE", "REPEATED", "config", "names"]

ARCHITECTURE = "MarianMTModel"
# The table of sinusoids, which older files keep, follows from the config.
REPEATED = (*bart.REPEATED, "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")


def config(keys: ConfigKeys) -> ModelConfig:
    """Marian."""
    common = bart.shared_keys(keys, vocab_size=58101, bos=None, pad=58100, eos=0)
    keys.require("share_encoder_decoder_embeddings", True)
    keys.require("decoder_vocab_size", common["vocab_size"])
    keys.require("normalize_embedding", False)
    keys.require("static_position_embeddings", True)
    keys.architecture("MarianMTModel")
    start = common["pad_token_id"]
    return bart.with_encoder(keys, start=start, **common, positions="sinusoidal_halves", logits_bias=True)

"""Recurrent seq2seq models: Sutskever et al. 2014, Bahdanau et al. 2014, Luong et al. 2015.

No other library knows this `model_type`, so this is its documentation. config.json:

    cell                rnn, lstm or gru (default)
    attention           none, bahdanau, dot, general (default) or concat; see alignment.py
    attention_size      of the keys of bahdanau and concat; default hidden_size
    input_feeding       true: the decoder also reads its last output
    vocab_size          of source and target together
    embedding_size      of a token's vector, in encoder and decoder; default hidden_size
    hidden_size         of the decoder's state and output
    encoder_size        of the encoder's state in each direction; default half of hidden_size
    encoder_layers, decoder_layers      default 1
    tie_word_embeddings true: the unembedding is the embedding, after a projection if the sizes differ
    dropout             on embeddings, between layers and on the output, locked: one mask for all tokens of a row
    weight_drop         DropConnect on the recurrent matrices (Merity et al. 2017)
    initializer_range   standard deviation of the embeddings at the start (default 0.1)
    forget_bias         of an LSTM at the start (default 1.0)
    bos_token_id, eos_token_id, pad_token_id, and decoder_start_token_id (default: BOS, or EOS without one)

Tensors: shared; encoder.{forward,backward}_layers.N.{input_proj,recurrent_proj}; bridge.N.h (and .c); decoder.layers.N
likewise, decoder.cross.{key,query,v}_proj, decoder.combine, decoder.out_proj; lm_head (with bias).
"""

from __future__ import annotations

from bildung.core.errors import ConfigError
from bildung.model.config_keys import ConfigKeys
from bildung.model.seq2seq import Seq2SeqConfig

ARCHITECTURE = "RecurrentSeq2Seq"


def config(keys: ConfigKeys) -> Seq2SeqConfig:
    """A GRU with Luong's general attention where nothing else is said."""
    hidden_size = keys.size("hidden_size")
    special = keys.special_tokens()
    start = [*keys.token_ids("decoder_start_token_id"), special["bos_token_id"], *special["eos_token_ids"]]
    start = [token for token in start if token is not None]
    if not start or not special["eos_token_ids"]:
        raise ConfigError(
            "config.json: a seq2seq model needs eos_token_id, which ends a target, and decoder_start_token_id (or "
            "bos_token_id), from which it is decoded; train the tokenizer with such tokens."
        )
    return Seq2SeqConfig(
        model_type="rnn_seq2seq",
        cell=keys.require("cell", "gru", "lstm", "rnn"),
        attention=keys.require("attention", "general", "none", "bahdanau", "dot", "concat"),
        attention_size=keys.size("attention_size", hidden_size),
        input_feeding=keys.flag("input_feeding", False),
        vocab_size=keys.size("vocab_size"),
        embedding_size=keys.size("embedding_size", hidden_size),
        hidden_size=hidden_size,
        encoder_size=keys.size("encoder_size", max(1, hidden_size // 2)),
        encoder_layers=keys.size("encoder_layers", 1),
        num_hidden_layers=keys.size("decoder_layers", 1),
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
        dropout=keys.number("dropout", 0.0),
        weight_drop=keys.number("weight_drop", 0.0),
        initializer_range=keys.number("initializer_range", 0.1),
        forget_bias=keys.number("forget_bias", 1.0),
        decoder_start_token_id=start[0],
        **special,
    )

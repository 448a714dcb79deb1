"""Recurrent language models: RNN (Elman 1990), LSTM (Hochreiter & Schmidhuber 1997), GRU (Cho et al. 2014).

No other library knows this `model_type`, so this is its documentation. config.json:

    cell                rnn, lstm or gru
    vocab_size, hidden_size (the state of a layer), num_hidden_layers (default 1)
    embedding_size      of a token's vector; default hidden_size
    hidden_act          of an rnn: tanh (default), relu, or identity, which makes it linear; the other cells have tanh
    tie_word_embeddings true: the unembedding is the embedding, after a projection if the sizes differ
    embed_dropout, hidden_dropout (between layers), output_dropout      locked: one mask for all tokens of a row
    weight_drop         DropConnect on the recurrent matrices (Merity et al. 2017: .5)
    initializer_range   standard deviation of the embeddings at the start (default 0.1)
    embed_scale         factor on token vectors before the first layer (default 1.0): a tied matrix starts small, to be
                        a good unembedding; times 1 / initializer_range its vectors are inputs of size 1
    recurrent_scale     size of every eigenvalue of W_hh at the start (default 1.0)
    forget_bias         of an LSTM at the start (default 1.0)
    bos_token_id, eos_token_id, pad_token_id

There is no longest text. Tensors: model.embed_tokens, model.layers.N.{input_proj,recurrent_proj} (weights one block of
rows per gate in torch's order, i f g o and r z n; biases), model.out_proj, lm_head (with bias).
"""

from __future__ import annotations

from bildung.model.config_keys import ConfigKeys
from bildung.model.rnn import RecurrentConfig

ARCHITECTURE = "RecurrentLM"


def config(keys: ConfigKeys) -> RecurrentConfig:
    """A tied GRU without dropout where nothing else is said."""
    cell = keys.require("cell", "gru", "lstm", "rnn")
    hidden_size = keys.size("hidden_size")
    return RecurrentConfig(
        model_type="rnn",
        cell=cell,
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden_size,
        embedding_size=keys.size("embedding_size", hidden_size),
        num_hidden_layers=keys.size("num_hidden_layers", 1),
        hidden_act=keys.require("hidden_act", *(("tanh", "relu", "identity") if cell == "rnn" else ("tanh",))),
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
        embed_dropout=keys.number("embed_dropout", 0.0),
        hidden_dropout=keys.number("hidden_dropout", 0.0),
        output_dropout=keys.number("output_dropout", 0.0),
        weight_drop=keys.number("weight_drop", 0.0),
        initializer_range=keys.number("initializer_range", 0.1),
        embed_scale=keys.number("embed_scale", 1.0),
        recurrent_scale=keys.number("recurrent_scale", 1.0),
        forget_bias=keys.number("forget_bias", 1.0),
        **keys.special_tokens(),
    )

"""What every model is: a config, matrices, activation sites, attached modules. The kinds of models build on it.

Model ─┬─ CausalLM ─┬─ Decoder         transformer.py
       │            ├─ RecurrentLM     rnn.py
       │            └─ Conditioned     a decoder with its source in mind (encoder_decoder.py, seq2seq.py)
       ├─ Encoder                      encoder.py
       ├─ EncoderDecoder, Seq2Seq      encoder_decoder.py, seq2seq.py
       └─ VisionTransformer            vit.py
"""

# B batch, L length, D hidden_size, V vocabulary

from __future__ import annotations

from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bildung.core.errors import DataError
from bildung.model.config import BaseConfig
from bildung.model.linear import Dense, Linear, linears
from bildung.model.taps import Taps


class Model(nn.Module):
    """compute_dtype: the type activations run in; the weights may be kept in a wider one (float32 masters for bfloat16
    training). None means the type of the first weight, the embedding's."""

    config: Any  # a BaseConfig; each kind of model says which

    def __init__(self, config: BaseConfig):
        super().__init__()
        self.config = config
        self.taps = Taps()
        self.attached = nn.ModuleDict()
        self.retrained: tuple[str, ...] = ()  # parameters that an adapter file holds whole (adapter_bitfit.py)
        self.compute_dtype: torch.dtype | None = None
        self.sites: dict[str, str] = {}

    def tie(self) -> None:
        """Make a tied unembedding the embedding's matrix (again)."""
        if self.config.tie_word_embeddings and getattr(self, "lm_head", None) is not None:
            cast(Linear, self.lm_head).base = Dense(cast(nn.Parameter, self.embedding.weight))

    @property
    def embedding(self) -> nn.Module:
        """The token vectors, below everything."""
        return self.model.embed_tokens  # type: ignore[union-attr,return-value]

    def name_linears(self) -> None:
        """Tell every matrix its path: the last line of a model's __init__."""
        for name, linear in linears(self).items():
            linear.name = name

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type of the embedding, in which unquantized weights are kept."""
        return next(self.parameters()).dtype

    @property
    def dtype(self) -> torch.dtype:
        """The type activations run in."""
        return self.compute_dtype or self.weight_dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def linears(self) -> dict[str, Linear]:
        """Module path -> weight matrix."""
        return linears(self)


class Cache(Protocol):
    """What a causal model remembers of the tokens read so far, so that the next costs one step."""

    length: int
    max_length: int

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order, repeated or left out (beam search)."""


class CausalLM(Model):
    """A model of the next token: `model(tokens_BL) -> logits_BLV`. Decoding, scoring and training need no more."""

    lm_head: Linear  # the unembedding

    @property
    def prefix_lm(self) -> bool:
        """Whether prompts are read in both directions (see prefix_lm.py)."""
        return getattr(self.config, "prefix_lm", None) is not None

    def kv_cache(self, batch_size: int, max_length: int) -> Any:
        """An empty memory (of a recurrent model: a state) of `max_length` tokens, prompt and answer, for each row."""
        raise NotImplementedError

    def hidden(
        self,
        tokens_BL: Tensor,
        *,
        positions_BL: Tensor | None = None,
        keep_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        prefix_BL: Tensor | None = None,
        kv_cache: Any = None,
    ) -> Tensor:
        """The final norm's output BLD; `unembed` turns chosen rows of it into logits (a loss needs only some)."""
        raise NotImplementedError

    def final_norm(self, x_BLD: Tensor) -> Tensor:
        """A residual stream -> what `unembed` reads: the last step of `hidden`, which lenses take from any layer."""
        raise NotImplementedError

    def unembed(self, h_BLD: Tensor) -> Tensor:
        """Final-norm output -> logits (any leading dimensions)."""
        raise NotImplementedError

    def select(self, rows_B: Tensor) -> CausalLM:
        """This model for other rows of a batch (beam search): itself, unless each row has a source of its own."""
        return self

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        positions_BL: Tensor | None = None,
        keep_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        prefix_BL: Tensor | None = None,
        kv_cache: Any = None,
    ) -> Tensor:
        """Logits_BLV of every next token.

        positions_BL: absolute positions (default: 0, 1, 2... after the cached ones). keep_BL: False marks padding; it
        is never inferred from token values. segments_BL: packed documents do not see each other. prefix_BL: True marks
        tokens that all see (prefix-LM). kv_cache: the tokens are appended to it. The tokens may be on another device.
        Raises DataError for a wrong shape.
        """
        return self.unembed(
            self.hidden(
                tokens_BL.to(self.device),
                positions_BL=positions_BL,
                keep_BL=keep_BL,
                segments_BL=segments_BL,
                prefix_BL=prefix_BL,
                kv_cache=kv_cache,
            )
        )


class Conditioned(CausalLM):
    """A decoder that has read its source. Its weights are the whole's; made anew for every source."""

    whole: Any  # the model of both halves

    def __init__(self, whole: Any, memory: Any):
        super().__init__(whole.config)
        # Only the decoder's half is a part of it: what decodes needs, moves and packs no encoder.
        object.__setattr__(self, "whole", whole)
        self.decoder, self.lm_head = whole.decoder, whole.lm_head
        self.taps, self.sites, self.compute_dtype = whole.taps, whole.sites, whole.compute_dtype
        self.memory = memory
        self.training = whole.training

    @property
    def embedding(self) -> nn.Module:
        return cast(nn.Module, self.whole.shared)

    def train(self, mode: bool = True) -> Self:
        """Switches the whole model's dropout: the weights that work here are the whole's."""
        self.whole.train(mode)
        self.training = mode
        return self

    def check_rows(self, tokens_BL: Tensor, sources: int) -> None:
        """Raises DataError unless there are as many rows of targets as of sources."""
        if sources != tokens_BL.shape[0]:
            raise DataError(f"{tokens_BL.shape[0]} target rows were given for {sources} sources; one each is needed.")

    def select(self, rows_B: Tensor) -> Conditioned:
        """The same decoder over other rows of the sources (beam search)."""
        raise NotImplementedError

    def final_norm(self, x_BLD: Tensor) -> Tensor:
        return cast(Tensor, self.decoder.final(x_BLD))

    def unembed(self, h_BLD: Tensor) -> Tensor:
        return cast(Tensor, self.whole.unembed(h_BLD))


def can_look(tensor: Tensor) -> bool:
    """Whether a check may read numbers now. On a GPU it would wait for the device, once per token; under
    torch.compile, and on fake tensors, which only have shapes, there are no numbers."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def check_tokens(tokens_BL: Tensor) -> int:
    """The length of a batch of token ids. Raises DataError for another shape or type."""
    if tokens_BL.ndim != 2 or tokens_BL.shape[1] == 0 or tokens_BL.is_floating_point():
        raise DataError(
            f"tokens of shape {tuple(tokens_BL.shape)} {tokens_BL.dtype} were given; "
            f"whole numbers of shape (batch, length) with at least one token are needed."
        )
    return tokens_BL.shape[1]

"""Virtual tokens: what every row reads before its first token. Prompt tuning and prefix tuning learn nothing else.

    Prompt   m vectors before the token vectors: the layers make keys and values of them    Lester et al. 2021
    Prefix   those keys and values themselves, layer by layer                               Li & Liang 2021

                 keys and values
    layer 1      p p p | t t t t        p: virtual tokens, positions 0 .. m-1
    layer 0      p p p | t t t t        t: a row's tokens, positions m .. m+L-1

In a causal model a virtual token sees only virtual tokens before it, so the keys and values of a prompt are the same
for every row: the m vectors go through the layers once per batch, not once per row, and from there on a prompt is a
prefix. Hence both are one thing here. The tokens' own states keep their shape (B, L, D): losses, masks, activation
sites and callers notice nothing, and what is left of the context, `config.max_position_embeddings`, is smaller by m.

Where every token sees every other (BERT, the encoder of T5) a prompt's vectors see the row, and are read with it; the
sites of that stack then show m + L places, the prompt's first. Of an encoder-decoder the encoder reads a prompt, and
the decoder, which then looks at the prompt's states too; a prefix stands before the decoder's own tokens.

One set of virtual tokens serves all documents of a packed row: every document sees it, at the distance that its own
positions, which begin at m, say. Where distance is counted in columns (ALiBi, sliding windows) that would be wrong, and
is refused; so is padding on the left, which would stand between the two.
"""

# B batch, L length, M virtual tokens, D hidden_size, K key-value heads, H head dim, F layers * 2 * K * H

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import AdapterError, DataError, SettingsError
from bildung.model.base import Model, can_look
from bildung.model.config import ModelConfig
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.encoder import Encoder
from bildung.model.encoder_decoder import EncoderDecoder
from bildung.model.kv_cache import KVCache
from bildung.model.transformer import Backbone, Decoder, Reading

KeysValues = list[tuple[Tensor, Tensor]]  # of each layer, rotated, (1, K, M, H)


class Collecting(KVCache):
    """Notes the keys and values of one pass."""

    def __init__(self) -> None:
        self.found: KeysValues = []

    def update(self, layer: int, k_BKLH: Tensor, v_BKLH: Tensor) -> tuple[Tensor, Tensor]:
        self.found.append((k_BKLH, v_BKLH))
        return k_BKLH, v_BKLH


class Joining(KVCache):
    """Puts keys and values before those of one pass, and keeps nothing: gradients reach what was put there."""

    def __init__(self, before: KeysValues):
        self.before, self.cross = before, {}

    def update(self, layer: int, k_BKLH: Tensor, v_BKLH: Tensor) -> tuple[Tensor, Tensor]:
        before = (one.expand(len(k_BKLH), -1, -1, -1) for one in self.before[layer])
        return cast(
            tuple[Tensor, Tensor],
            tuple(torch.cat((old, new), dim=2) for old, new in zip(before, (k_BKLH, v_BKLH), strict=True)),
        )


class Virtual(nn.Module):
    """Virtual tokens. Subclasses hold what was learned as parameters."""

    length: int  # M
    encoded = False  # of an encoder-decoder: whether the encoder reads them, or the decoder

    def keys_values(self, backbone: Backbone, dtype: torch.dtype) -> KeysValues:
        """Keys and values of every layer."""
        raise NotImplementedError

    def before(self, backbone: Backbone, reading: Reading, dtype: torch.dtype) -> Reading:
        """How tokens are read that follow the virtual ones: all places are M further on.

        A cache that has read nothing yet gets the virtual tokens first. Raises DataError (see above), SettingsError for
        a cache that has no place for them.
        """
        M, cache = self.length, reading.kv_cache
        _check_distances(backbone, reading, M)
        if self.beside(backbone):
            return replace(reading, positions_BL=reading.positions_BL + M)
        keep_BS = reading.keep_BS
        if cache is None:
            cache = Joining(self.keys_values(backbone, dtype))
            keep_BS = None if keep_BS is None else F.pad(keep_BS, (M, 0), value=True)
        elif cache.length == 0:
            for layer, (k_1KMH, v_1KMH) in enumerate(self.keys_values(backbone, dtype)):
                cache.keys[layer][:, :, :M] = k_1KMH
                cache.values[layer][:, :, :M] = v_1KMH
        prefix_BS = None if reading.prefix_BS is None else F.pad(reading.prefix_BS, (M, 0), value=True)
        return replace(
            reading,
            positions_BL=reading.positions_BL + M,
            keep_BS=keep_BS,
            prefix_BS=prefix_BS,
            kv_cache=cache,
            past=reading.past + M,
        )

    def beside(self, backbone: Backbone) -> bool:
        """Whether the virtual tokens are read beside each row's tokens, and are no keys and values alone."""
        return False

    def join(self, backbone: Backbone, x_BLD: Tensor, reading: Reading) -> tuple[Tensor, Reading]:
        """The row with its virtual tokens in front, for those who are `beside` it. Raises DataError."""
        raise NotImplementedError


def _check_distances(backbone: Backbone, reading: Reading, M: int) -> None:
    total = M + reading.past + reading.positions_BL.shape[1]
    by_columns = backbone.bias is not None or any(w is not None and w < total for w in backbone.config.windows)
    if not by_columns:
        return
    if reading.segments_BL is not None:
        raise DataError(
            "several documents are packed into a row behind virtual tokens, and this model counts distances in columns "
            "(ALiBi, a sliding window): all but the first would be too far from them. Use one document per row: "
            "pack = False."
        )
    keep_BS = reading.keep_BS
    if keep_BS is not None and can_look(keep_BS) and not bool(keep_BS[:, M if reading.kv_cache else 0].all()):
        raise DataError(
            "rows padded on the left stand behind virtual tokens, and this model counts distances in columns (ALiBi, a "
            "sliding window): the padding would lie between them. Use prompts of one length, or one at a time."
        )


class Prompt(Virtual):
    """Vectors that stand before the tokens' (Lester et al. 2021, arXiv 2104.08691, section 2).

    They enter where the embedding's do: after a scale of the embedding (Gemma), before learned positions are added.
    """

    encoded = True

    def __init__(self, prompt_MD: Tensor):
        super().__init__()
        self.prompt_MD = nn.Parameter(prompt_MD)
        self.length = len(prompt_MD)

    def keys_values(self, backbone: Backbone, dtype: torch.dtype) -> KeysValues:
        return read_vectors(backbone, self.prompt_MD.to(dtype))

    def beside(self, backbone: Backbone) -> bool:
        return not backbone.config.causal

    def join(self, backbone: Backbone, x_BLD: Tensor, reading: Reading) -> tuple[Tensor, Reading]:
        if reading.segments_BL is not None:
            raise DataError(
                "several documents are packed into a row, and here a prompt sees what follows it: it would carry one "
                "document's words to the next. Use one document per row: pack = False."
            )
        B, M = len(x_BLD), self.length
        places_1M = torch.arange(M, device=x_BLD.device)[None]
        front_1MD = _placed(backbone, self.prompt_MD.to(x_BLD.dtype)[None], places_1M)
        positions_BL = reading.positions_BL
        keep_BS = None if reading.keep_BS is None else F.pad(reading.keep_BS, (M, 0), value=True)
        positions_BS = torch.cat((places_1M.expand(len(positions_BL), M), positions_BL), dim=1)
        joined = torch.cat((front_1MD.expand(B, M, -1), x_BLD), dim=1)
        return joined, replace(reading, positions_BL=positions_BS, keep_BS=keep_BS)


class Prefix(Virtual):
    """Keys and values of every layer (Li & Liang 2021, arXiv 2101.00190, section 4), keys after their rotation.

    prefix_MF: peft's order, [layer 0: keys, values; layer 1: ...], heads inside.
    """

    def __init__(self, config: ModelConfig, prefix_MF: Tensor):
        super().__init__()
        self.shape = (config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        self.prefix_MF = nn.Parameter(prefix_MF)
        self.length = len(prefix_MF)

    def values_MF(self) -> Tensor:
        """The prefix, however it is parameterised."""
        return self.prefix_MF

    def keys_values(self, backbone: Backbone, dtype: torch.dtype) -> KeysValues:
        layers = self.values_MF().to(dtype).view(self.length, *self.shape).permute(1, 2, 3, 0, 4)
        return [(k_KMH[None], v_KMH[None]) for k_KMH, v_KMH in layers]


def read_vectors(backbone: Backbone, x_MD: Tensor) -> KeysValues:
    """What the layers remember of vectors that stand first: keys and values at positions 0 .. M-1.

    Attached modules work on them as on tokens; those who only look on, or change tokens' activations, do not see them.
    """
    positions_1M = torch.arange(len(x_MD), device=x_MD.device)[None]
    x_1MD = _placed(backbone, x_MD[None], positions_1M)
    collecting = Collecting()
    with backbone.taps.attached_only():
        backbone.run(x_1MD, Reading(positions_1M, kv_cache=collecting))
    return collecting.found


def _placed(backbone: Backbone, x_1MD: Tensor, positions_1M: Tensor) -> Tensor:
    """Vectors with those of their positions and of the first segment."""
    if backbone.token_types is not None:
        x_1MD = x_1MD + backbone.token_types(torch.zeros_like(positions_1M)).to(x_1MD.dtype)
    if backbone.embed_positions is not None:
        x_1MD = x_1MD + backbone.embed_positions(positions_1M, x_1MD.dtype)
    return x_1MD


def flatten(found: KeysValues) -> Tensor:
    """Keys and values -> prefix_MF."""
    stacked = torch.stack([torch.cat(pair) for pair in found])  # layers, 2, K, M, H
    return stacked.permute(3, 0, 1, 2, 4).flatten(1)


def prefix_size(config: ModelConfig) -> int:
    """F: what a virtual token takes in all layers."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim


def virtual_of(model: Model) -> Virtual | None:
    """The virtual tokens of a model, if it has any."""
    stacks = (getattr(model, half, None) for half in ("model", "encoder", "decoder"))
    return next((found for stack in stacks if (found := getattr(stack, "virtual", None)) is not None), None)


def stack_of(model: Model, kind: type[Virtual]) -> Backbone:
    """The stack before whose rows such virtual tokens stand. Raises AdapterError for a model without a place."""
    if isinstance(model, Decoder | DecoderClassifier | Encoder):
        return model.model
    if isinstance(model, EncoderDecoder):
        return model.encoder if kind.encoded else model.decoder
    raise AdapterError(
        f"virtual tokens were given to a {model.config.model_type} of kind {model.config.kind!r}; only language models "
        f"made of Transformers have a place for them. Use one, or `tune lora`, `tune adapter`."
    )


def check_room(model: Model, length: int, kind: type[Virtual]) -> None:
    """Raises AdapterError for a model without a place for virtual tokens, SettingsError for more than its context."""
    stack_of(model, kind)
    context = _context(model, kind) + (virtual.length if (virtual := virtual_of(model)) else 0)
    if not 1 <= length < context:
        raise SettingsError(
            f"{length} virtual tokens were given; a model with a context of {context} (max_position_embeddings) takes "
            f"1 to {context - 1}, so that there is room for text."
        )


def add_virtual(model: Model, virtual: Virtual) -> None:
    """Put virtual tokens before everything that `model` reads, in place of those it has.

    The context left, model.config.max_position_embeddings (for the prompt of an encoder-decoder: its encoder's),
    shrinks by their number. Raises as `check_room`.
    """
    kind = type(virtual)
    check_room(model, virtual.length, kind)
    remove_virtual(model)
    stack_of(model, kind).virtual = virtual.to(model.device)
    _set_context(model, kind, _context(model, kind) - virtual.length)


def remove_virtual(model: Model) -> Virtual | None:
    """Take the virtual tokens away; returns them."""
    virtual = virtual_of(model)
    if virtual is not None:
        kind = type(virtual)
        stack_of(model, kind).virtual = None
        _set_context(model, kind, _context(model, kind) + virtual.length)
    return virtual


def _context(model: Model, kind: type[Virtual]) -> int:
    config: Any = model.config
    if isinstance(model, EncoderDecoder) and kind.encoded:
        config = config.encoder
    return int(config.max_position_embeddings)


def _set_context(model: Model, kind: type[Virtual], left: int) -> None:
    if isinstance(model, EncoderDecoder) and kind.encoded:
        encoder = replace(cast(ModelConfig, model.config.encoder), max_position_embeddings=left)
        model.config = replace(model.config, encoder=encoder)
    else:
        model.config = replace(model.config, max_position_embeddings=left)

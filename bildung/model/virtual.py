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

One set of virtual tokens serves all documents of a packed row: every document sees it, at the distance that its own
positions, which begin at m, say. Where distance is counted in columns (ALiBi, sliding windows) that would be wrong, and
is refused; so is padding on the left, which would stand between the two.
"""

# B batch, L length, M virtual tokens, D hidden_size, K key-value heads, H head dim, F layers * 2 * K * H

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import AdapterError, DataError, SettingsError
from bildung.model.base import Model, can_look
from bildung.model.config import ModelConfig
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
        self.before = before

    def update(self, layer: int, k_BKLH: Tensor, v_BKLH: Tensor) -> tuple[Tensor, Tensor]:
        before = (one.expand(len(k_BKLH), -1, -1, -1) for one in self.before[layer])
        return cast(
            tuple[Tensor, Tensor],
            tuple(torch.cat((old, new), dim=2) for old, new in zip(before, (k_BKLH, v_BKLH), strict=True)),
        )


class Virtual(nn.Module):
    """Virtual tokens. Subclasses hold what was learned as parameters."""

    length: int  # M

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

    def __init__(self, prompt_MD: Tensor):
        super().__init__()
        self.prompt_MD = nn.Parameter(prompt_MD)
        self.length = len(prompt_MD)

    def keys_values(self, backbone: Backbone, dtype: torch.dtype) -> KeysValues:
        return read_vectors(backbone, self.prompt_MD.to(dtype))


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
    x_1MD = x_MD[None]
    if backbone.embed_positions is not None:
        x_1MD = x_1MD + backbone.embed_positions(positions_1M, x_MD.dtype)
    collecting = Collecting()
    with backbone.taps.attached_only():
        backbone.run(x_1MD, Reading(positions_1M, kv_cache=collecting))
    return collecting.found


def flatten(found: KeysValues) -> Tensor:
    """Keys and values -> prefix_MF."""
    stacked = torch.stack([torch.cat(pair) for pair in found])  # layers, 2, K, M, H
    return stacked.permute(3, 0, 1, 2, 4).flatten(1)


def prefix_size(config: ModelConfig) -> int:
    """F: what a virtual token takes in all layers."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim


def virtual_of(model: Model) -> Virtual | None:
    """The virtual tokens of a model, if it has any."""
    return cast("Virtual | None", getattr(getattr(model, "model", None), "virtual", None))


def check_decoder(model: Model, length: int) -> None:
    """Raises AdapterError for a model without a place for virtual tokens, SettingsError for more than its context."""
    if not isinstance(model, Decoder):
        reason = "its tokens see what follows, so a prompt's states would depend on the text"
        if model.config.kind != "encoder":
            reason = "only decoders have a place for them"
        raise AdapterError(
            f"virtual tokens were given to a {model.config.model_type} of kind {model.config.kind!r}; {reason}. "
            f"Use a decoder, or `tune lora`, `tune adapter`."
        )
    context = model.config.max_position_embeddings + (virtual.length if (virtual := virtual_of(model)) else 0)
    if not 1 <= length < context:
        raise SettingsError(
            f"{length} virtual tokens were given; a model with a context of {context} (max_position_embeddings) takes "
            f"1 to {context - 1}, so that there is room for text."
        )


def add_virtual(model: Model, virtual: Virtual) -> None:
    """Put virtual tokens before everything that `model` reads, in place of those it has.

    The context left, model.config.max_position_embeddings, shrinks by their number. Raises as `check_decoder`.
    """
    check_decoder(model, virtual.length)
    remove_virtual(model)
    model.model.virtual = virtual.to(model.device)  # type: ignore[union-attr]
    left = model.config.max_position_embeddings - virtual.length
    model.config = replace(model.config, max_position_embeddings=left)


def remove_virtual(model: Model) -> Virtual | None:
    """Take the virtual tokens away; returns them."""
    virtual = virtual_of(model)
    if virtual is not None:
        model.model.virtual = None  # type: ignore[union-attr]
        whole = model.config.max_position_embeddings + virtual.length
        model.config = replace(model.config, max_position_embeddings=whole)
    return virtual

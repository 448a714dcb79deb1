"""The decoder-only Transformer: embed, a stack of pre-norm blocks, a final norm, and the unembedding.

    tokens -> embed -> [ x + attn(norm(x)) -> x + mlp(norm(x)) ] × layers -> norm -> lm_head -> logits
                         resid_pre    resid_mid          resid_post

Module names are Hugging Face's, so a checkpoint's tensor names are the module paths; site names are TransformerLens's.
"""

# B batch, L length, S cached + new length, D hidden_size, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn

from bildung.core.errors import DataError
from bildung.model.attention import Attention, Mask, make_mask
from bildung.model.config import ModelConfig
from bildung.model.kv_cache import KVCache
from bildung.model.layers import Embedding, GatedMLP, RMSNorm
from bildung.model.linear import Dense, Linear, linears
from bildung.model.positions import RotaryEmbedding
from bildung.model.taps import Taps


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, taps: Taps, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, taps, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config, taps, layer)
        self.taps = taps
        self.pre_site, self.mid_site, self.post_site = (f"layers.{layer}.resid_{w}" for w in ("pre", "mid", "post"))

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Mask, kv_cache: KVCache | None) -> Tensor:
        x_BLD = self.taps(self.pre_site, x_BLD)
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos, sin, mask, kv_cache)
        x_BLD = self.taps(self.mid_site, x_BLD)
        x_BLD = x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
        return self.taps(self.post_site, x_BLD)


class Backbone(nn.Module):
    """Everything below the unembedding (Hugging Face's `model.` prefix)."""

    def __init__(self, config: ModelConfig, taps: Taps):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, taps, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)


class Decoder(nn.Module):
    """A causal language model: `model(tokens_BL) -> logits_BLV`.

    compute_dtype: the type activations run in; the weights may be kept in a wider one (float32 masters for bfloat16
    training). None means the type of the embedding.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.taps = Taps()
        self.model = Backbone(config, self.taps)
        # A tied unembedding is the same Parameter; it is saved once, under the embedding's name.
        tied = self.model.embed_tokens.weight if config.tie_word_embeddings else None
        head = tied if tied is not None else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.lm_head = Linear(Dense(head), name="lm_head")
        self.attached = nn.ModuleDict()
        self.compute_dtype: torch.dtype | None = None
        self.sites = _site_shapes(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type activations run in."""
        return self.compute_dtype or self.model.embed_tokens.weight.dtype

    def linears(self) -> dict[str, Linear]:
        """Module path -> weight matrix."""
        return linears(self)

    def kv_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `max_length` tokens (prompt and answer) in each of `batch_size` rows."""
        return KVCache(self.config, batch_size, max_length, self.dtype, self.device)

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        positions_BL: Tensor | None = None,
        keep_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Logits_BLV of every next token.

        positions_BL: absolute positions (default: 0, 1, 2... after the cached ones). keep_BL: False marks padding; it
        is never inferred from token values. segments_BL: packed documents do not see each other. kv_cache: the tokens
        are appended to it. Raises DataError for a wrong shape.
        """
        return self.unembed(
            self.hidden(
                tokens_BL, positions_BL=positions_BL, keep_BL=keep_BL, segments_BL=segments_BL, kv_cache=kv_cache
            )
        )

    def hidden(
        self,
        tokens_BL: Tensor,
        *,
        positions_BL: Tensor | None = None,
        keep_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """The final norm's output BLD; `unembed` turns chosen rows of it into logits (a loss needs only some)."""
        L = _check_tokens(tokens_BL)
        past = kv_cache.length if kv_cache is not None else 0
        if kv_cache is not None:
            kv_cache.reserve(L, keep_BL)
            keep_BS = None if kv_cache.all_kept else kv_cache.keep_BS
        else:
            keep_BS = keep_BL
        if positions_BL is None:
            positions_BL = torch.arange(past, past + L, device=tokens_BL.device)[None]
        masks = {
            window: make_mask(L, past, window, keep_BS, segments_BL, tokens_BL.device)
            for window in set(self.config.windows)
        }
        cos, sin = self.model.rotary(positions_BL, self.dtype)
        x_BLD = self.taps("embed", self.model.embed_tokens(tokens_BL).to(self.dtype))
        for block, window in zip(self.model.layers, self.config.windows, strict=True):
            x_BLD = block(x_BLD, cos, sin, masks[window], kv_cache)
        if kv_cache is not None:
            kv_cache.length += L
        return self.taps("norm", self.model.norm(x_BLD))

    def unembed(self, h_BLD: Tensor) -> Tensor:
        """Final-norm output -> logits (any leading dimensions)."""
        return self.taps("logits", self.lm_head(h_BLD))


def _check_tokens(tokens_BL: Tensor) -> int:
    if tokens_BL.ndim != 2 or tokens_BL.shape[1] == 0 or tokens_BL.is_floating_point():
        raise DataError(
            f"tokens of shape {tuple(tokens_BL.shape)} {tokens_BL.dtype} were given; "
            f"whole numbers of shape (batch, length) with at least one token are needed."
        )
    return tokens_BL.shape[1]


def _site_shapes(config: ModelConfig) -> dict[str, str]:
    """The closed list of activation sites with their shapes, in forward order (see taps.py)."""
    per_layer = {
        "resid_pre": "B L D",
        "attn.q": "B L N H",
        "attn.k": "B L K H",
        "attn.v": "B L K H",
        "attn.scores": "B N L S",
        "attn.probs": "B N L S",
        "attn.z": "B L N H",
        "attn.out": "B L D",
        "resid_mid": "B L D",
        "mlp.act": "B L F",
        "mlp.out": "B L D",
        "resid_post": "B L D",
    }
    layers = {f"layers.{i}.{word}": shape for i in range(config.num_hidden_layers) for word, shape in per_layer.items()}
    return {"embed": "B L D", **layers, "norm": "B L D", "logits": "B L V"}


def build(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder with random float32 weights: N(0, initializer_range²) matrices, zero biases, unit norms.

    The same seed gives the same weights on every machine (drawn on the CPU, in parameter order).
    """
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return model

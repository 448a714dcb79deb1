"""What a model is made of, read from a Hugging Face config.json with every key accounted for (see config_keys.py).

One flat dataclass describes every stack of Transformer blocks; the raw dictionary is kept and written back on save.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from bildung.core.errors import ConfigError, nearest
from bildung.core.json_file import read_object
from bildung.model.config_keys import ConfigKeys, is_size

# The families this code can build: one file each in families/, named by config.json's `model_type`.
MODEL_TYPES = tuple(sorted(p.stem for p in (Path(__file__).parent / "families").glob("*.py") if p.stem[0] != "_"))

SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings"
).split()
MAX_LAYERS = 4096  # many times the deepest model known; every layer is built before its tensors are looked for

DROPOUTS = (
    "embed_dropout attention_dropout residual_dropout activation_dropout final_dropout classifier_dropout drop_path"
).split()

Kind = Literal["decoder", "classifier", "encoder", "encoder-decoder", "vision", "recurrent", "seq2seq"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and how it was stretched (see positions.rope_frequencies)."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "ntk", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "original_max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"config.json: RoPE with {name} = {getattr(self, name)}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What every language model has, a recurrent one too. Field names are Hugging Face's where it has a name."""

    model_type: str
    kind: Kind = "decoder"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class ImageShape:
    """What a vision model looks at: pixels (height, width), patches (pixels per side), channels."""

    image_size: tuple[int, int]
    patch_size: int
    num_channels: int = 3
    interpolation: str = "bicubic"  # how positions are stretched to another grid: bilinear, or ...-antialias
    registers: int = 0
    mask_token: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True, kw_only=True)
class ModelConfig(BaseConfig):
    """A stack of Transformer blocks and what is below and above it. Of an encoder-decoder: the decoder's stack, with
    the encoder's in `encoder`."""

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    # Normalisation: what it computes, where it stands, and what it adds to its weight (Gemma stores weight - 1).
    norm: Literal["rms", "layer", "batch"] = "rms"
    norm_eps: float
    norm_offset: float = 0.0
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    parallel_residual: bool = False  # attention and feed-forward read the same stream (GPT-J, GPT-NeoX)
    embed_norm: bool = False
    final_norm: bool = True
    layer_scale: float | None = None  # where a learned factor per feature on what sublayers add starts; None: no factor
    drop_path: float = 0.0  # share of examples that skip a sublayer, in training only (Huang et al. 2016, 1603.09382)
    # Feed-forward
    mlp: bool = True  # False: attention alone, the toy models of circuits (Elhage et al. 2021)
    hidden_act: str = "silu"
    gated: bool = True
    # Positions
    positions: Literal["rope", "learned", "sinusoidal", "sinusoidal_halves", "integer", "alibi", "t5", "none"] = "rope"
    position_offset: int = 0  # rows of a learned table that stand before position 0 (RoBERTa, BART: 2)
    rope: Rope = field(default_factory=Rope)
    local_rope: Rope | None = None  # of the layers with a sliding window (Gemma 3)
    rotary_dim: int | None = None  # how many dimensions of a head are rotated; None = all
    relative_buckets: int = 32  # T5's relative bias: buckets, and the distance from which all share the last one
    relative_max_distance: int = 128
    # Attention
    causal: bool = True
    prefix_lm: Literal["text", "source"] | None = None  # a prompt is seen in both directions: see prefix_lm.py
    cross: bool = False  # each block also attends to an encoder's states
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None  # what scores are multiplied by; None = 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    attention_sinks: bool = False  # a learned score per head that takes probability and gives nothing (gpt-oss)
    logit_softcap: float | None = None
    # Sliding window of each layer, in tokens counted with the query itself; None = sees everything before it.
    windows: tuple[int | None, ...] = ()
    # Factors on the embeddings and on the states before the unembedding
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    # Dropout, in training only
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    activation_dropout: float = 0.0
    final_dropout: float = 0.0  # on what a stack gives out (T5)
    # Starting weights: see init.py
    init: Literal["normal", "gpt2", "xavier", "t5", "truncated"] = "normal"
    # Encoders: segment vectors, and the heads that lie in the file (see heads.py)
    token_types: int = 0
    heads: tuple[str, ...] = ()
    transform_act: str | None = None  # activation of the masked-language head; None = hidden_act
    num_labels: int = 0
    classifier_dropout: float = 0.0
    image: ImageShape | None = None
    # Encoder-decoders
    encoder: ModelConfig | None = None
    decoder_start_token_id: int | None = None
    logits_bias: bool = False  # numbers added to the logits that lie in the file and never train (BART)

    def __post_init__(self) -> None:
        for name in SIZES:
            if name == "vocab_size" and self.kind == "vision":
                continue  # images have no vocabulary
            if not is_size(value := getattr(self, name)):
                raise ConfigError(f"config.json: {name} = {value!r}; it must be a positive whole number.")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ConfigError(f"config.json: num_hidden_layers = {self.num_hidden_layers}; at most {MAX_LAYERS}.")
        if self.norm_eps < 0:
            raise ConfigError(f"config.json: the norm's eps = {self.norm_eps}; it must not be negative.")
        if self.initializer_range < 0:
            raise ConfigError(
                f"config.json: weights would start with a standard deviation of {self.initializer_range}; it must not "
                f"be negative."
            )
        if self.decoder_start_token_id is not None and self.decoder_start_token_id >= self.vocab_size:
            raise ConfigError(
                f"config.json: decoder_start_token_id = {self.decoder_start_token_id}, and the vocabulary has "
                f"{self.vocab_size} tokens; decoding would start from a token that is none."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config.json: num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}; every key-value head serves equally many queries."
            )
        rotated = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if self.positions == "rope" and (rotated % 2 or not 0 < rotated <= self.head_dim):
            raise ConfigError(
                f"config.json: RoPE would turn {rotated} of the head_dim = {self.head_dim} dimensions of a head; it "
                f"turns pairs, so an even number up to head_dim is needed and {rotated} is "
                f"{'odd' if rotated % 2 else 'not one'}."
            )
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} = {getattr(self, name)}; it must lie in [0, 1).")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_hidden_layers)
        if len(self.windows) != self.num_hidden_layers:
            raise ConfigError(
                f"config.json: {len(self.windows)} attention windows for {self.num_hidden_layers} layers."
            )


# Close relatives of what is read, with the reason why they are not.
NOT_READ = {
    "gemma3": "It is Gemma 3 with its image tower; the text half alone has model_type 'gemma3_text': its config is "
    "`text_config`, its tensors are those under `language_model.`.",
    "gemma2": "Of the Gemmas, the third is read: model_type 'gemma3_text'.",
}


def from_dict(raw: dict[str, Any]) -> ModelConfig:
    """A configuration from a config.json dictionary.

    Raises ConfigError for an unknown architecture, an unknown or missing key, an impossible or unsupported value.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        hint = NOT_READ.get(str(model_type)) or nearest(str(model_type).lower(), MODEL_TYPES)
        raise ConfigError(
            f"config.json: model_type = {model_type!r} is not known; known: {', '.join(MODEL_TYPES)}. {hint}".strip()
        )
    if raw.get("auto_map"):
        raise ConfigError("config.json: `auto_map` asks to run code that came with the model; that is never done here.")
    family = import_module(f"bildung.model.families.{model_type}")
    keys = ConfigKeys(raw)
    keys.take("model_type")
    keys.take("quantization_config", None)  # read by model/store.py: how the numbers are stored, not what they are
    config: ModelConfig = family.config(keys)
    if config.kind == "decoder" and keys.is_classifier():
        # A head in place of the unembedding: the same keys, whatever the family (see decoder_classifier.py).
        config = replace(config, kind="classifier", num_labels=keys.num_labels(), tie_word_embeddings=False)
    keys.finish()
    return replace(config, raw=raw)


def read_config(directory: Path) -> ModelConfig:
    """ModelConfig of a Hugging Face model directory."""
    path = directory / "config.json"
    if not path.exists():
        raise ConfigError(f"{directory} holds no config.json; a Hugging Face model directory is expected.")
    raw = read_object(path, ConfigError)
    try:
        return from_dict(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None

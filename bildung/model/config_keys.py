"""The keys of a config.json, ticked off as a family reads them.

A `config.json` is hostile until checked, and a key that is silently dropped is a wrong model. So a family *takes* the
keys it honours, requires fixed values for the ones it does not implement, and `finish()` refuses whatever is left over.
"""

from __future__ import annotations

from typing import Any

from bildung.core.errors import ConfigError, nearest

# Keys that say nothing about the numbers: bookkeeping of transformers and sentence-transformers, defaults of generate()
# and of pipelines.
INERT_KEYS = frozenset(
    "architectures dtype torch_dtype transformers_version use_cache _name_or_path return_dict output_hidden_states "
    "output_attentions chunk_size_feed_forward id2label label2id problem_type is_llama_config transformers.js_config "
    "task_specific_params _model_name_or_path unk_token_id gradient_checkpointing output_past prefix _num_labels "
    "max_length min_length do_sample temperature top_k top_p repetition_penalty no_repeat_ngram_size bad_words_ids "
    "num_beams num_return_sequences length_penalty early_stopping forced_bos_token_id forced_eos_token_id "
    "num_beam_groups diversity_penalty typical_p encoder_no_repeat_ngram_size output_scores return_dict_in_generate "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens eos_token_ids "
    "force_bos_token_to_be_generated save_step finetuning_task tokenizer_class sep_token_id torchscript use_bfloat16 "
    "xla_device tf_legacy_loss custom_pipelines sbert_ce_default_activation_function sentence_transformers "
    "unsloth_version unsloth_fixed _attn_implementation_autoset".split()
)
# What transformers before 5 may say of any model; at these values it changes nothing.
IDLE_VALUES: dict[str, Any] = {
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}


def is_size(value: Any) -> bool:
    """A positive whole number that a tensor can have as size."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def is_number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


class ConfigKeys:
    """The keys of one config.json, ticked off as a family reads them."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = raw
        self.left = {k: v for k, v in raw.items() if k not in INERT_KEYS}
        self.known: set[str] = set()

    def take(self, name: str, *default: Any) -> Any:
        """The value of `name` (null counts as absent); without a default the key is required."""
        self.known.add(name)
        value = self.left.pop(name, None)
        if value is not None:
            return value
        if default:
            return default[0]
        raise ConfigError(
            f"config.json of model_type {self.raw.get('model_type')!r} lacks the key {name!r}, which has no default."
        )

    def size(self, name: str, *default: int | None) -> Any:
        """A positive whole number (or the default, which may be None)."""
        value = self.take(name, *default)
        if name in self.raw and self.raw[name] is not None and not is_size(value):
            raise ConfigError(f"config.json: {name} = {value!r}; it must be a positive whole number.")
        return value

    def number(self, name: str, *default: float) -> float:
        """A finite number."""
        value = self.take(name, *default)
        if not is_number(value):
            raise ConfigError(f"config.json: {name} = {value!r}; it must be a number.")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {name} = {value!r}; it must be true or false.")
        return value

    def require(self, name: str, *allowed: Any) -> Any:
        """`name` must be absent or one of `allowed`: other values change the numbers in a way not built here."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"config.json: {name} = {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}."
            )
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.take(name, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ConfigError(f"config.json: {name} = {value!r}; it must be a token id or a list of token ids.")
        return tuple(ids)

    def architecture(self, *allowed: str) -> str:
        """Which of transformers' classes wrote the file, so which heads lie in it; the first where none is named."""
        given = self.raw.get("architectures") or [allowed[0]]
        if not isinstance(given, list) or len(given) != 1 or given[0] not in allowed:
            raise ConfigError(
                f"config.json: architectures = {str(given)[:80]} is not known for model_type "
                f"{self.raw.get('model_type')!r}; known: {', '.join(allowed)}."
            )
        return str(given[0])

    def is_classifier(self) -> bool:
        """Whether `architectures` names a class with a classification head."""
        named = self.raw.get("architectures")
        return isinstance(named, list) and any(str(one).endswith("ForSequenceClassification") for one in named)

    def num_labels(self) -> int:
        """How many classes a classification head tells apart: those that id2label names; transformers' default is 2."""
        names = self.raw.get("id2label")
        count = self.size("num_labels", 2 if names is None else len(names) if isinstance(names, dict) else 0)
        if names is not None and (not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}):
            raise ConfigError(
                f'config.json: id2label = {str(names)[:80]}; it must name the classes "0", "1" and so on.'
            )
        if not is_size(count) or (names is not None and count != len(names)):
            raise ConfigError(f"config.json: {count} classes, and id2label names {len(names or {})}; give one number.")
        return int(count)

    def special_tokens(self) -> dict[str, Any]:
        """bos_token_id, eos_token_ids, pad_token_id."""
        bos, pad = self.token_ids("bos_token_id"), self.token_ids("pad_token_id")
        return {
            "bos_token_id": bos[0] if bos else None,
            "eos_token_ids": self.token_ids("eos_token_id"),
            "pad_token_id": pad[0] if pad else None,
        }

    def finish(self) -> None:
        """Refuse what nobody took."""
        # A null is transformers' way to write "not set".
        unknown = {
            k: v for k, v in self.left.items() if v is not None and not (k in IDLE_VALUES and v == IDLE_VALUES[k])
        }
        if unknown:
            name, value = next(iter(unknown.items()))
            raise ConfigError(
                f"config.json: unknown key {name!r} = {str(value)[:80]!r} for model_type "
                f"{self.raw.get('model_type')!r} ({len(unknown)} unknown: {', '.join(sorted(unknown))}). "
                f"Ignoring it could silently change the model. {nearest(name, self.known)}".strip()
            )


def per_head(hidden_size: int, heads: int) -> int:
    """The width of a head where config.json does not give it. Raises ConfigError when the heads do not divide."""
    if hidden_size % heads:
        raise ConfigError(
            f"config.json: hidden_size = {hidden_size} does not divide into {heads} attention heads; take a number of "
            f"heads that divides it, or, where the family has the key, say head_dim."
        )
    return hidden_size // heads

"""Encoder checkpoints: what a file holds besides what its config.json says.

`architectures` names one of transformers' classes, and the class a set of heads. The files are freer than that:

    bert-base-uncased        says BertForMaskedLM, and holds the pooler and the next-sentence head too
    sentence-transformers    say BertModel; some hold no pooler; their tensors lack the "bert." in front
    files of before 2020     keep the unembedding's bias under one of two names

So the class says which heads must be there, and the tensors which others are. What is written back is all of it, and
`architectures` then names the class that opens the most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bildung.core.errors import ConfigError
from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys


@dataclass(frozen=True)
class EncoderFiles:
    """How one family's files are laid out.

    classes   transformers' class -> the heads it has; the first is the bare model
    prefix    what stands before the tensors below the heads in every class but the bare model
    body      the first parts of these tensors' names
    marks     head -> how the name of a tensor begins that tells it is there; for heads that a class may not mention
    biases    the unembedding's bias: its names when it stands alone, and beside an untied matrix
    """

    classes: Mapping[str, tuple[str, ...]]
    prefix: str
    body: tuple[str, ...]
    marks: Mapping[str, str]
    biases: tuple[str, str]

    def heads(self, keys: ConfigKeys) -> tuple[str, ...]:
        """The heads of the class that config.json names (without one: of the bare model). Raises ConfigError."""
        return self.classes[keys.architecture(*self.classes)]

    def architecture(self, config: ModelConfig) -> str:
        """The class with the most of this model's heads and none that it lacks."""
        bare = next(iter(self.classes))

        def opened(name: str) -> int:
            heads = set(self.classes[name])
            return len(heads) if heads <= set(config.heads) and name != bare else 0

        return max(self.classes, key=opened)

    def class_with(self, heads: Collection[str]) -> str:
        """The class with exactly these heads. Raises ConfigError when the family has none."""
        for name, its in self.classes.items():
            if set(its) == set(heads):
                return name
        known = "; ".join(f"{name}: {', '.join(its) or 'none'}" for name, its in self.classes.items())
        raise ConfigError(f"no {self.prefix.rstrip('.')} has the heads {', '.join(sorted(heads))}. There are {known}.")

    def body_prefix(self, config: ModelConfig) -> str:
        """What stands before the names of the tensors below the heads."""
        return "" if self.architecture(config) == next(iter(self.classes)) else self.prefix

    def bias(self, config: ModelConfig) -> str:
        """The name of the unembedding's bias."""
        return self.biases[0] if config.tie_word_embeddings else self.biases[1]

    def present(self, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The heads that are really there; the tensors are renamed, in place, as a model with these heads asks."""
        for name in [name for name in tensors if name.startswith(self.prefix)]:
            tensors[name.removeprefix(self.prefix)] = tensors.pop(name)
        found = {head for head, mark in self.marks.items() if any(name.startswith(mark) for name in tensors)}
        declared = set(config.heads)
        if config.heads == next(iter(self.classes.values())):
            declared -= {"pooler"}  # a bare model may have one or not
        order = dict.fromkeys(head for heads in self.classes.values() for head in heads)
        config = replace(config, heads=tuple(head for head in order if head in declared | found))
        prefix = self.body_prefix(config)
        for name in [name for name in tensors if name.startswith(self.body)]:
            tensors[prefix + name] = tensors.pop(name)
        for other in self.biases:
            if self.bias(config) not in tensors and other in tensors:
                tensors[self.bias(config)] = tensors.pop(other)
        return {"heads": config.heads}

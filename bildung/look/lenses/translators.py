"""The tuned lens: before the logit lens reads a layer, an affine map brings its stream into the last layer's basis.

    lens_l(h) = W_U · LN_f(h + A_l h + b_l)          A_l = 0, b_l = 0 at first: then it is the logit lens, bit for bit

One translator (A_l, b_l) per layer but the last, of which the final norm reads already (Belrose et al. 2023, arXiv
2303.08112). It belongs to the weights it was trained on: a lens made before a tune is wrong after it, and nothing in
its shapes says so. Its file holds their hash, and other weights are refused.
"""

# B batch, L length, D hidden_size

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import ModelFileError
from bildung.look.asked import whole_of
from bildung.model.safetensors_file import read_file, write_file
from bildung.model.store import LanguageModel

SETTINGS, TENSORS = "tuned_lens.json", "tuned_lens.safetensors"


class Translator(nn.Module):
    """h -> h + A h + b, computed in float32 and given back in the type of h."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, h_BLD: Tensor) -> Tensor:
        wide = h_BLD.float()
        return (wide + nn.functional.linear(wide, self.weight, self.bias)).to(h_BLD.dtype)


class TunedLens(nn.Module):
    """A translator for every layer but the last. belongs_to: the hash of the weights (see `weights_hash`)."""

    def __init__(self, layers: int, size: int, belongs_to: str, made_on: str = ""):
        super().__init__()
        self.layers = nn.ModuleList(Translator(size) for _ in range(layers - 1))
        self.size, self.belongs_to, self.made_on = size, belongs_to, made_on

    def forward(self, h_BLD: Tensor, layer: int) -> Tensor:
        """The stream after `layer`, in the basis of the last; of the last layer, as it is."""
        if layer == len(self.layers):
            return h_BLD
        translated: Tensor = self.layers[layer](h_BLD)
        return translated


def new_lens(lm: LanguageModel) -> TunedLens:
    """The logit lens of a model, as a tuned lens that has not been trained; on the model's device."""
    made_on = "" if lm.path is None else lm.path.name
    lens = TunedLens(lm.config.num_hidden_layers, lm.config.hidden_size, weights_hash(lm), made_on)
    return lens.to(lm.model.device)


def weights_hash(lm: LanguageModel) -> str:
    """SHA-256 of all numbers of a model as it is in memory: names, types, shapes and bytes, with what was added to it.

    The same weights loaded in another type are other numbers, and have another hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(whole_of(lm.model).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def check_belongs(lens: TunedLens, lm: LanguageModel) -> None:
    """Raises ModelFileError unless the lens was made on these very weights."""
    found = weights_hash(lm)
    if found != lens.belongs_to:
        named = f" ({lens.made_on})" if lens.made_on else ""
        raise ModelFileError(
            f"this tuned lens belongs to the weights {lens.belongs_to[:16]}{named}, and the model has the weights "
            f"{found[:16]} ({lm.path}). A lens is wrong on other weights: train one with `bildung look tuned_lens`. "
            "(The same directory loaded in another dtype has other weights.)"
        )


def write_lens(lens: TunedLens, directory: Path, about: dict[str, Any] | None = None) -> None:
    """tuned_lens.safetensors and tuned_lens.json, with the hash of the weights it belongs to."""
    described = {"weights": lens.belongs_to, "made_on": lens.made_on, "layers": len(lens.layers) + 1}
    described |= {"hidden_size": lens.size, **(about or {})}
    (directory / SETTINGS).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    write_file({name: t.detach().cpu().contiguous() for name, t in lens.state_dict().items()}, directory / TENSORS)


def read_lens(directory: str | Path, lm: LanguageModel) -> TunedLens:
    """The lens of a directory, for this model. Raises ModelFileError for one that cannot be read, or was made on other
    weights, naming both hashes."""
    directory = Path(directory)
    try:
        told = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        lens = TunedLens(int(told["layers"]), int(told["hidden_size"]), str(told["weights"]), str(told["made_on"]))
        check_belongs(lens, lm)
        lens.load_state_dict(dict(read_file(directory / TENSORS)))
    except OSError as error:
        raise ModelFileError(f"{directory} holds no tuned lens ({SETTINGS}, {TENSORS}): {error}.") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"the tuned lens in {directory} cannot be used: {error}") from error
    return lens.requires_grad_(False).eval().to(lm.model.device)

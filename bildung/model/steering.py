"""Steering vectors: a direction that is added to an activation while the model writes.

    h <- h + strength · v       at one site, at all positions or at chosen ones

v is usually the mean activation on texts that have a property minus the mean on texts that lack it (look/steering.py;
activation addition: Turner et al. 2023, arXiv 2308.10248; contrastive: Rimsky et al. 2024, arXiv 2312.06681).
A file holds the vector, its site and the hash of the weights it was measured on; other weights have other directions,
so it is refused there unless asked otherwise.
"""

# D the site's last axis

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bildung.core.errors import BadIntervention, ModelFileError, SettingsError
from bildung.core.record import hash_directory
from bildung.model.selection import parse
from bildung.model.taps import intervene, match_sites

if TYPE_CHECKING:
    from bildung.model.store import LanguageModel

NAME = "steering.safetensors"


@dataclass(frozen=True)
class Steering:
    """One vector. weights: hash of the model directory it was measured on."""

    site: str
    vector_D: Tensor
    weights: str
    how: str = "difference of means"

    def save(self, file: Path) -> None:
        """Write the file."""
        about = json.dumps({"site": self.site, "weights": self.weights, "how": self.how})
        save_file({"vector": self.vector_D.contiguous()}, file, metadata={"format": "pt", "steering": about})


def read_steering(file: Path) -> Steering:
    """A steering vector from its file, or from the directory it lies in. Raises ModelFileError."""
    file = Path(file) / NAME if Path(file).is_dir() else Path(file)
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {})["steering"])
            return Steering(about["site"], opened.get_tensor("vector"), about["weights"], about["how"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ModelFileError(f"{file} is no steering vector ({error}); `bildung look steering` makes one.") from error


@contextmanager
def steered(
    lm: LanguageModel, steering: Steering, strength: float = 1.0, *, at: str = "", other_weights: bool = False
) -> Iterator[None]:
    """Inside the block `strength` times the vector is added at the vector's site.

    at: a selection of positions (selection.py): "[:, -1:]" from the prompt's last token on; "" everywhere.
    Raises ModelFileError for a vector of other weights (unless `other_weights`), BadIntervention for one of another
    width, SettingsError for a strength that is no number, NoSuchSite.
    """
    if not torch.isfinite(torch.tensor(strength)):
        raise SettingsError(f"strength = {strength}; give a number, for instance 4.")
    if parse(f"x{at}")[0] != "x":
        raise SettingsError(f"at = {at!r}; it is a selection such as '[:, -1:]', or empty for all positions.")
    if not other_weights and lm.path is not None and hash_directory(lm.path) != steering.weights:
        raise ModelFileError(
            f"this steering vector was measured on other weights than those of {lm.path}; make it anew with "
            "`bildung look steering`, or pass other_weights to add it all the same."
        )
    match_sites(lm.model, steering.site)

    def add(x: Tensor) -> Tensor:
        if x.shape[-1] != len(steering.vector_D):
            raise BadIntervention(
                f"a steering vector of {len(steering.vector_D)} numbers cannot be added at {steering.site}, whose "
                f"vectors have {x.shape[-1]}."
            )
        return x + strength * steering.vector_D.to(x)

    with intervene(lm.model, {f"{steering.site}{at}": add}):
        yield

"""Causal tracing: where does a model keep what it knows of a subject? (Meng et al. 2022, arXiv 2202.05262, section 2)

    clean       The Space Needle is in the city of -> Seattle          p(Seattle) high
    corrupted   the subject's embeddings + noise                       p low
    restored    the same noise, one state put back as it was           p comes back where that state decides

The noise is normal with 3 standard deviations of the embeddings (of all entries of the token matrix; the authors take
those of the subjects in their data), drawn anew for each of several samples, whose mean is reported. What is put back:
resid_post at one layer, or attn.out or mlp.out at a window of layers, since one layer's share is small. Of an
encoder-decoder the noise is on the source; a place such as decoder.cross.out is one of its answer so far.
"""

# L tokens, R noise samples, D hidden_size

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bildung.core.errors import DataError, SettingsError
from bildung.look.asked import stack_prefix
from bildung.look.causal.patching import Answers, last_logits, layer_sites
from bildung.look.patchscopes.patch_targets import tokens_for
from bildung.look.prompt import encode_text
from bildung.model.store import LanguageModel
from bildung.model.taps import Tap, intervene, observe
from bildung.model.taps import sites as sites_of

WINDOWED = ("attn.out", "cross.out", "mlp.out")


@dataclass(frozen=True)
class Trace:
    """Probabilities of the answer: clean, corrupted, and restored[site][layer, position], means over noise samples."""

    tokens: list[int]
    subject: tuple[int, int]  # its first token, and the one after its last
    answer: int
    sigma: float
    clean: float
    corrupted: float
    restored: dict[str, Tensor]


def span_of(lm: LanguageModel, prompt: str, subject: str) -> tuple[list[int], tuple[int, int]]:
    """The prompt's tokens, and which of them spell the subject. Raises DataError if it is not in the prompt.

    Found by where each token stands in the text, never by tokenizing the subject on its own.
    """
    start = prompt.find(subject)
    if not subject.strip() or start < 0:
        raise DataError(f"the subject {subject!r} is not in the prompt {prompt!r}; give it as it stands there.")
    ids = encode_text(lm, prompt)[0]
    found = tokens_for(lm, prompt, start, start + len(subject), ids)
    if not found:
        raise DataError(f"no token of the prompt stands for the subject {subject!r}.")
    return ids, (found[0], found[-1] + 1)


@torch.no_grad()
def causal_trace(
    model: Answers,
    tokens: Sequence[int],
    subject: tuple[int, int],
    answer: int | None = None,
    *,
    places: Sequence[str] = ("resid_post", "mlp.out", "attn.out"),
    deviations: float = 3.0,
    samples: int = 10,
    window: int = 10,
    seed: int = 0,
) -> Trace:
    """Restore every state of a prompt whose subject's embeddings are noisy. answer None: what the model says itself.

    window: of how many layers around each attn.out and mlp.out are put back. Raises DataError for a subject outside of
    the prompt, SettingsError for a place that no layer has.
    """
    if min(samples, window) < 1 or not 0 < deviations < math.inf:
        raise SettingsError(
            f"samples = {samples}, window = {window}, deviations = {deviations}; the first two are at least 1, the "
            "noise has a size above 0."
        )
    start, stop = subject
    if not 0 <= start < stop <= len(tokens):
        raise DataError(f"the subject, tokens {start} to {stop - 1}, is not within the prompt's {len(tokens)} tokens.")
    device = model.device
    tokens_1L = torch.tensor([list(tokens)], device=device)
    tokens_RL = tokens_1L.expand(samples, -1)
    vectors_VD = cast(Tensor, model.embedding.weight).float() * getattr(model.config, "embed_scale", 1.0)
    sigma = deviations * vectors_VD.std().item()
    drawn = torch.randn(samples, stop - start, vectors_VD.shape[1], generator=torch.Generator().manual_seed(seed))
    noise_RSD = (sigma * drawn).to(device, model.dtype)

    def corrupt(x_RLD: Tensor) -> Tensor:
        x_RLD = x_RLD.clone()
        x_RLD[:, start:stop] += noise_RSD
        return x_RLD

    names = {place: layer_sites(model, place) for place in places}
    shapes = {place: sites_of(model)[some[0]] for place, some in names.items()}
    if wrong := [f"{place} ({shape})" for place, shape in shapes.items() if not shape.startswith("B L ")]:
        raise SettingsError(f"{wrong[0]} has nothing for each token to put back; resid_post, attn.out, mlp.act have.")
    if not names:
        raise SettingsError("nothing to put back: name sites, such as resid_post.")
    with observe(model, [name for some in names.values() for name in some]) as seen:
        probs_V = last_logits(model, tokens_1L)[0].float().softmax(-1)
    clean = dict(seen)
    answer = int(probs_V.argmax()) if answer is None else answer

    def probability(edits: dict[str, Tap]) -> float:
        with intervene(model, {f"{stack_prefix(model)}embed": corrupt, **edits}):
            return last_logits(model, tokens_RL).float().softmax(-1)[:, answer].mean().item()

    restored = {}
    for place, sites in names.items():
        restored[place] = torch.zeros(len(sites), clean[sites[0]].shape[1])
        for layer in range(len(sites)):
            low, high = layer, layer + 1
            if place.endswith(WINDOWED):
                low, high = max(0, layer - window // 2), min(len(sites), layer - window // 2 + window)
            for position in range(restored[place].shape[1]):
                edits = {name: _putting_back(clean[name], position) for name in sites[low:high]}
                restored[place][layer, position] = probability(edits)
    return Trace(list(tokens), subject, answer, sigma, probs_V[answer].item(), probability({}), restored)


def _putting_back(clean_1LD: Tensor, position: int) -> Tap:
    def tap(x_RLD: Tensor) -> Tensor:
        x_RLD = x_RLD.clone()
        x_RLD[:, position] = clean_1LD[0, position]
        return x_RLD

    return tap

"""Affine maps from one model's residual stream to another's, by least squares on text that both have read.

    f(h) = A h + b        min over A, b of the sum of ||A h + b - h*||²        h after layer l of M, h* after l* of M*

(Ghandeharioun et al. 2024, section on cross-model Patchscopes; Merullo et al. 2022 and Din et al. 2023 before them.)
The vectors that belong together are those of positions where both models have read the same text: the ends of tokens,
in characters, that both tokenizers share. A map belongs to the weights of both models; their hashes are in its file,
and other weights are refused.

Sums of products in float64 are all that is kept of the text, so its length costs no memory. A grain of ridge (1e-6 of
the mean variance, the stream centred) keeps directions in which nothing varies from being amplified.
"""

# N positions, D the source's hidden_size, E the target's

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bildung.core.errors import DataError, ModelFileError, SettingsError
from bildung.look.lenses.translators import weights_hash
from bildung.look.patchscopes.patchscopes import streams
from bildung.look.prompt import encode_text
from bildung.model.safetensors_file import read_file, write_file
from bildung.model.store import LanguageModel
from bildung.tokens.spans import encode_with_spans

SETTINGS, TENSORS = "stream_map.json", "stream_map.safetensors"
RIDGE = 1e-6
Pair = tuple[int, int]  # layer of the source, layer of the target


@dataclass
class StreamMaps:
    """{(layer, target layer): (A ED, b E)}; calling one is the f of a Patchscope."""

    maps: dict[Pair, tuple[Tensor, Tensor]]
    source: str  # hashes of the weights, see translators.weights_hash
    target: str
    made_on: tuple[str, str] = ("", "")  # what the models were called

    def __call__(self, h_RD: Tensor, layer: int, target_layer: int) -> Tensor:
        """A h + b in float32. Raises SettingsError for a pair of layers that was not learned."""
        if (layer, target_layer) not in self.maps:
            known = ", ".join(f"{a} -> {b}" for a, b in self.maps)
            raise SettingsError(f"no map goes from layer {layer} to layer {target_layer}; these were learned: {known}.")
        weight_ED, bias_E = self.maps[layer, target_layer]
        return torch.nn.functional.linear(h_RD.float(), weight_ED.to(h_RD.device), bias_E.to(h_RD.device))


class _Sums:
    """What least squares needs of the vectors of one pair of layers."""

    def __init__(self, size: int, target_size: int):
        self.count = 0
        self.x, self.y = torch.zeros(size, dtype=torch.float64), torch.zeros(target_size, dtype=torch.float64)
        self.xx = torch.zeros(size, size, dtype=torch.float64)
        self.xy = torch.zeros(size, target_size, dtype=torch.float64)
        self.yy = 0.0

    def add(self, x_ND: Tensor, y_NE: Tensor) -> None:
        x_ND, y_NE = x_ND.double().cpu(), y_NE.double().cpu()
        self.count += len(x_ND)
        self.x += x_ND.sum(0)
        self.y += y_NE.sum(0)
        self.xx += x_ND.T @ x_ND
        self.xy += x_ND.T @ y_NE
        self.yy += float(y_NE.square().sum())

    def solve(self) -> tuple[Tensor, Tensor]:
        """(A ED, b E) in float32. Raises DataError for fewer positions than numbers."""
        if self.count <= len(self.x):
            raise DataError(
                f"{self.count} positions of text were read and a vector has {len(self.x)} numbers; least squares needs "
                "more positions than numbers. Give more text."
            )
        mean_D, mean_E = self.x / self.count, self.y / self.count
        covariance_DD = self.xx / self.count - mean_D[:, None] * mean_D
        cross_DE = self.xy / self.count - mean_D[:, None] * mean_E
        covariance_DD.diagonal().add_(RIDGE * covariance_DD.diagonal().mean())
        weight_DE = torch.linalg.solve(covariance_DD, cross_DE)
        return weight_DE.T.float().contiguous(), (mean_E - mean_D @ weight_DE).float()

    def explained(self, weight_ED: Tensor, bias_E: Tensor) -> float:
        """R²: the share of the target's variance that the map gives."""
        a, b = weight_ED.double(), bias_E.double()
        residual = self.yy - 2 * float((self.xy * a.T).sum()) - 2 * float(self.y @ b)
        residual += float(((a @ self.xx) * a).sum()) + 2 * float((a @ self.x) @ b) + self.count * float(b @ b)
        return 1 - residual / max(self.yy - float(self.y.square().sum()) / self.count, 1e-30)


def shared_positions(a: LanguageModel, b: LanguageModel, text: str, longest: int) -> tuple[list[list[int]], list[Pair]]:
    """(token ids of both models, positions at which both have read the same text), within `longest` tokens."""
    read, ends = [], []
    for lm in (a, b):
        whole, spans = encode_text(lm, text)
        read.append(whole[:longest])
        # Position 0 is left out: whatever stands there, its vector is an attention sink, a hundred times as long.
        places = ((n, start, stop) for n, (start, stop) in enumerate(spans))
        last = {stop: place for place, start, stop in places if stop > start and 0 < place < longest}
        ends.append(last)
    return read, [(ends[0][stop], ends[1][stop]) for stop in sorted(ends[0].keys() & ends[1].keys())]


def pieces(lm: LanguageModel, texts: Iterable[str], length: int, limit: int) -> Iterator[str]:
    """Stretches of at most `length` tokens of one model, as text, `limit` of them; short ends are left out."""
    found = 0
    for text in texts:
        _, spans = encode_with_spans(lm.tokenizer, text)
        for first in range(0, len(spans), length):
            part = spans[first : first + length]
            if len(part) >= min(length, 8) and found < limit:
                found += 1
                yield text[part[0][0] : part[-1][1]]
        if found == limit:
            return


def learn_maps(
    source: LanguageModel,
    target: LanguageModel,
    texts: Iterable[str],
    pairs: Sequence[Pair],
    *,
    longest: int = 128,
    held_out: int = 8,
) -> tuple[StreamMaps, dict[Pair, float], int]:
    """(the maps, R² of each on held-out texts, positions learned from). Every `held_out`-th text is held out.

    Raises DataError for too little text and for text at whose positions the tokenizers never agree."""
    sizes = source.config.hidden_size, target.config.hidden_size
    seen, tested = {pair: _Sums(*sizes) for pair in pairs}, {pair: _Sums(*sizes) for pair in pairs}
    for lm in (source, target):
        lm.model.eval()
    for number, text in enumerate(texts):
        (ids, target_ids), places = shared_positions(source, target, text, longest)
        if not places:
            continue
        a_NLD, _ = streams(source, ids)
        b_NLE = a_NLD if target is source else streams(target, target_ids)[0]
        mine, theirs = (list(one) for one in zip(*places, strict=True))
        for layer, target_layer in pairs:
            sums = (tested if number % held_out == held_out - 1 else seen)[layer, target_layer]
            sums.add(a_NLD[layer, mine], b_NLE[target_layer, theirs])
    if not tested[pairs[0]].count:
        raise DataError(f"fewer than {held_out} texts that both models read in common; give more text.")
    maps = {pair: sums.solve() for pair, sums in seen.items()}
    explained = {pair: tested[pair].explained(*made) for pair, made in maps.items()}
    names = tuple("" if lm.path is None else lm.path.name for lm in (source, target))
    return (
        StreamMaps(maps, weights_hash(source), weights_hash(target), (names[0], names[1])),
        explained,
        seen[pairs[0]].count,
    )


def check_belongs(maps: StreamMaps, source: LanguageModel, target: LanguageModel) -> None:
    """Raises ModelFileError unless the maps were learned between these very weights."""
    given = {"source": (source, maps.source), "target": (target, maps.target)}
    for place, (which, (lm, wanted)) in enumerate(given.items()):
        if (found := weights_hash(lm)) != wanted:
            named = f" ({maps.made_on[place]})" if maps.made_on[place] else ""
            raise ModelFileError(
                f"this map's {which} has the weights {wanted[:16]}{named}, and {lm.path} has {found[:16]}. A map is "
                "wrong on other weights: learn one with `bildung look stream_map`. (The same directory loaded in "
                "another dtype has other weights.)"
            )


def write_maps(maps: StreamMaps, directory: Path) -> None:
    """stream_map.safetensors and stream_map.json, with the hashes of both models' weights."""
    told = {"source": maps.source, "target": maps.target, "made_on": list(maps.made_on)}
    (directory / SETTINGS).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    tensors: dict[str, Tensor] = {}
    for (layer, target_layer), (weight_ED, bias_E) in maps.maps.items():
        tensors |= {f"{layer}.{target_layer}.weight": weight_ED, f"{layer}.{target_layer}.bias": bias_E}
    write_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / TENSORS)


def read_maps(directory: str | Path, source: LanguageModel, target: LanguageModel) -> StreamMaps:
    """The maps of a directory, for these models. Raises ModelFileError for what cannot be read or was learned between
    other weights."""
    directory = Path(directory)
    try:
        told = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        tensors = dict(read_file(directory / TENSORS))
        weights = {name.removesuffix(".weight"): t for name, t in tensors.items() if name.endswith(".weight")}
        pairs = {(int(name.split(".")[0]), int(name.split(".")[1])): name for name in weights}
        maps = {pair: (weights[name], tensors[f"{name}.bias"]) for pair, name in pairs.items()}
        made = StreamMaps(maps, str(told["source"]), str(told["target"]), (told["made_on"][0], told["made_on"][1]))
    except OSError as error:
        raise ModelFileError(f"{directory} holds no stream map ({SETTINGS}, {TENSORS}): {error}.") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelFileError(f"the stream map in {directory} cannot be used: {error}") from error
    check_belongs(made, source, target)
    return made

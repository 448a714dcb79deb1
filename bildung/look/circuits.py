"""What a model's heads are by their weights: what each copies, and which heads read what earlier ones wrote.

    bildung look circuits MODEL OUT
    bildung look circuits MODEL OUT --distances 1 2 3 4          of a model with RoPE: as seen so many tokens apart

No text is read. head_weights.py says what QK and OV are and how norms, RoPE and grouped heads are treated,
composition.py what composition is; chance, 1/√D, is subtracted from it. OUT gets circuits.html (one file, works
offline), circuits.json and circuits.safetensors. From Python: `head_weights(model)`, `composition(layers)`.
"""

# N layers, H heads, M = N · H heads of all layers

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.look.attention_heads.composition import KINDS, baseline, composition
from bildung.look.attention_heads.head_weights import copying, embedding, head_weights, matching, through, unembedding
from bildung.look.pages.page import command_of, look_page
from bildung.model.base import CausalLM
from bildung.model.encoder_decoder import EncoderDecoder
from bildung.model.store import LanguageModel, load

STRONGEST = 40  # pairs in the table of each kind


@settings_class
class Settings:
    """Circuits of weights."""

    prefix: str = ""  # "encoder." or "decoder." of a model that has both; default: the decoder
    distances: tuple[int, ...] = (0,)  # of query to key, for RoPE: one, or several whose mean is taken


def circuits(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make the page and the arrays. Raises DataError for a model without attention layers, or no such stack."""

    def work(job: Job) -> None:
        lm = load(source)
        arrays = circuit_arrays(lm, settings)
        save_file({name: array.contiguous() for name, array in arrays.items()}, job.out / "circuits.safetensors")
        numbers = as_json(arrays, lm, settings, Path(source).name)
        (job.out / "circuits.json").write_text(json.dumps(numbers, ensure_ascii=False) + "\n", encoding="utf-8")
        (job.out / "circuits.html").write_text(page(numbers, arrays, command_of(job)), encoding="utf-8")
        job.measured = {f"strongest {kind}-composition": words(pairs[0]) for kind, pairs in numbers["pairs"].items()}

    return perform("look circuits", source, out, settings, work, force=force)


@torch.no_grad()
def circuit_arrays(lm: LanguageModel, settings: Settings | None = None) -> dict[str, Tensor]:
    """ "Q", "K", "V": composition above chance (M, M), row the later head, NaN where there is none. "norm of QK",
    "norm of OV", and where the stream leads to tokens "OV copying" and "QK matching": (N, H). Raises DataError."""
    given = settings or Settings()
    prefix = given.prefix or ("decoder." if isinstance(lm.model, EncoderDecoder) else "")
    layers = head_weights(lm.model, prefix=prefix, distances=given.distances)
    arrays = {kind: scores - baseline(layers[0].q_NHD.shape[-1]) for kind, scores in composition(layers).items()}
    arrays["norm of QK"] = torch.stack([layer.qk.norm().cpu() for layer in layers])
    arrays["norm of OV"] = torch.stack([layer.ov.norm().cpu() for layer in layers])
    if isinstance(lm.model, CausalLM) or prefix == "decoder.":
        e_VD = embedding(lm.model, prefix)
        through_DD = through(e_VD, unembedding(lm.model, prefix))
        arrays["OV copying"] = torch.stack([copying(layer, through_DD) for layer in layers])
        arrays["QK matching"] = torch.stack([matching(layer, e_VD) for layer in layers])
    return arrays


def as_json(arrays: dict[str, Tensor], lm: LanguageModel, given: Settings, model: str) -> dict[str, Any]:
    """What the page shows besides the matrices: per head, and the pairs of highest composition."""
    layers, heads = arrays["norm of OV"].shape
    per_head = {name: array for name, array in arrays.items() if name not in KINDS}
    return {
        "model": model,
        "layers": layers,
        "heads": heads,
        "distances": list(given.distances),
        "chance": baseline(lm.config.hidden_size),
        "scores": {name: [[round(v, 4) for v in row] for row in t.tolist()] for name, t in per_head.items()},
        "pairs": {kind: strongest(arrays[kind], heads) for kind in KINDS} if layers > 1 else {},
    }


def strongest(scores_MM: Tensor, heads: int) -> list[dict[str, Any]]:
    """The pairs of highest composition, the highest first."""
    values, places = scores_MM.nan_to_num(-2).flatten().sort(descending=True)
    total, found = len(scores_MM), []
    for value, place in zip(values[:STRONGEST].tolist(), places[:STRONGEST].tolist(), strict=True):
        if value > -2:  # else there is no such pair
            later, earlier = divmod(place, total)
            found.append({"later": divmod(later, heads), "earlier": divmod(earlier, heads), "score": round(value, 4)})
    return found


def words(pair: dict[str, Any]) -> str:
    """1.4 reads 0.2: +0.310"""
    (layer, head), (before, other) = pair["later"], pair["earlier"]
    return f"{layer}.{head} reads {before}.{other}: {pair['score']:+.3f}"


def page(numbers: dict[str, Any], arrays: dict[str, Tensor], command: str) -> str:
    """circuits.html. A matrix travels as bytes between its least and its highest value."""
    matrices = {}
    for kind in numbers["pairs"]:
        known = arrays[kind][arrays[kind].isfinite()]
        low, high = float(known.min()), float(known.max())
        steps = ((arrays[kind].nan_to_num(low) - low) / max(high - low, 1e-9) * 255).round().byte()
        text = base64.b64encode(steps.contiguous().numpy().tobytes()).decode()
        matrices[kind] = {"low": low, "high": high, "bytes": text}
    shown = {kind: [words(pair) for pair in pairs] for kind, pairs in numbers["pairs"].items()}
    keys = ("model", "layers", "heads", "scores", "chance", "distances")
    return look_page(
        "circuits.html",
        script="circuits.js",
        command=command,
        data=numbers | {"matrices": matrices},
        pairs=shown,
        **{key: numbers[key] for key in keys},
    )

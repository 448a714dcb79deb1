"""Adapters on disk in PEFT's format: adapter_config.json + adapter_model.safetensors.

What `peft` writes is read here, and `peft` reads what is written here, with equal logits. Several low-rank deltas on
one matrix are one low-rank delta of their summed rank, [B1 B2] [A1; A2], so a model tuned, edited and tuned again is
still one ordinary adapter on its base. Names and shapes are those of the family's files (see adapter_names.py).
"""

# R rank, I input features, O output features

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import AdapterError, OutputError, nearest
from bildung.model.adapter_names import apart, is_transposed, targets, together
from bildung.model.linear import Linear, LowRank, linears
from bildung.model.safetensors_file import read_file, write_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The class of peft that opens the adapter with a head for its task; None: the plain one.
TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}

# peft's keys that change the numbers: only these values are built here. Keys absent from a file have the first value.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "lora_ga_config": (None,),
    "kappa_tune_config": (None,),
}
# Keys that describe how training went, where things lie, or what the tensors' own names and shapes say again.
READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "rank_pattern", "base_model_name_or_path"}
INERT = READ | set(
    "task_type inference_mode revision auto_mapping target_modules exclude_modules layers_to_transform layers_pattern "
    "init_lora_weights megatron_config megatron_core loftq_config eva_config corda_config runtime_config peft_version "
    "qalora_group_size ensure_weight_tying "
    "fan_in_fan_out".split()  # peft looks at the layer itself, and says so when the two disagree
)


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, every key accounted for. Raises AdapterError."""
    path = directory / CONFIG
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(given, dict):
        raise AdapterError(f"{path} holds a {type(given).__name__}; a JSON object is expected.")
    for key, value in given.items():
        allowed = REQUIRED.get(key)
        if allowed is not None and value not in allowed:
            raise AdapterError(f"{path}: {key} = {value!r} is not supported; allowed: {allowed[0]!r}.")
        if allowed is None and key not in INERT and value not in (None, False, {}, []):
            raise AdapterError(f"{path}: unknown key {key!r} = {value!r}. {nearest(key, INERT | set(REQUIRED))}")
    patterns = given.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_strength, [given.get("lora_alpha", 8), *patterns.values()])):
        raise AdapterError(f"{path}: lora_alpha and the values of alpha_pattern must be numbers.")
    dropout = given.get("lora_dropout") or 0.0
    if not _is_strength(dropout) or not 0 <= dropout < 1:
        raise AdapterError(f"{path}: lora_dropout = {dropout!r}; it must lie in [0, 1).")
    for key, kind, words in (("use_rslora", bool, "true or false"), ("base_model_name_or_path", str, "a path")):
        if not isinstance(given.get(key), kind | None):
            raise AdapterError(f"{path}: {key} = {given[key]!r}; it must be {words}.")
    return given


def _is_strength(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def find_base(directory: Path, settings: dict[str, Any]) -> Path:
    """The base model's directory: where the config says, or, when the life was moved, its sibling of that name."""
    named = settings.get("base_model_name_or_path") or ""
    for place in (Path(named), directory / named, directory.parent / Path(named).name):
        if named and (place / "config.json").exists():
            return place
    raise AdapterError(
        f"{directory / CONFIG} names the base model {named!r}, which is not a model directory here; "
        f"put it there, or say where it is: bildung relink {directory} BASE"
    )


def add_to(model: Any, directory: Path, settings: dict[str, Any], name: str = "default") -> None:
    """Add the adapter's deltas to `model` under `name`. Raises AdapterError when they do not fit it."""
    pairs: dict[str, dict[str, Tensor]] = {}
    path = directory / TENSORS
    for key, tensor in read_file(path):
        target, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B"):
            raise AdapterError(f"{path}: tensor {key!r} is neither a lora_A nor a lora_B.")
        pairs.setdefault(target, {})[factor] = tensor
    matrices, there = targets(model), linears(model)
    if not pairs:
        raise AdapterError(f"{path} holds no tensors; an adapter that matches no layer changes nothing.")
    alphas = settings.get("alpha_pattern") or {}
    for key in alphas:
        if not any(_fits(key, target) for target in pairs):
            # peft also takes regular expressions; here a stranger's file gets none to run.
            raise AdapterError(f"{directory / CONFIG}: alpha_pattern names {key!r}, which is no matrix of the adapter.")
    for target, factors in pairs.items():
        members = matrices.get(target)
        if members is None:
            raise AdapterError(
                f"{path} was made for a matrix {target!r} that this model does not have. {nearest(target, matrices)}"
            )
        lora_A, lora_B = factors.get("lora_A"), factors.get("lora_B")
        if lora_A is None or lora_B is None:
            raise AdapterError(f"{path}: {target} has only one of lora_A and lora_B.")
        _check(lora_A, lora_B, [there[name] for name in members], f"{path}: {target}")
        alpha = next((a for key, a in alphas.items() if _fits(key, target)), settings.get("lora_alpha", 8))
        rank = lora_A.shape[0]
        scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
        for linear_name, (A, B) in apart(lora_A, lora_B, members).items():
            linear = there[linear_name]
            delta = LowRank(linear.in_features, linear.out_features, 1, scaling, settings.get("lora_dropout") or 0.0)
            delta.lora_A, delta.lora_B = nn.Parameter(A), nn.Parameter(B)
            linear.deltas[name] = delta.to(model.device).eval()


def _check(lora_A: Tensor, lora_B: Tensor, members: list[Linear], where: str) -> None:
    """Raises AdapterError unless the factors are finite and of the matrix's shape."""
    inputs, outputs = members[0].in_features, sum(linear.out_features for linear in members)
    rank = lora_A.shape[0] if lora_A.dim() > 1 else 0
    if rank == 0 or lora_A[0].numel() != inputs or tuple(lora_B.flatten(1).shape) != (outputs, rank):
        raise AdapterError(
            f"{where}: factors {tuple(lora_B.shape)} x {tuple(lora_A.shape)} do not fit a matrix of shape "
            f"({outputs}, {inputs}); the adapter belongs to another model."
        )
    floats = lora_A.is_floating_point() and lora_B.is_floating_point()
    if not floats or not bool(torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
        raise AdapterError(f"{where} holds values that are not finite numbers; the file is damaged.")


def _fits(key: str, target: str) -> bool:
    """Whether a key of peft's alpha_pattern means the matrix: its module path, or what that ends in."""
    return target == key or target.endswith(f".{key}")


def check_place(model: Any, base: Path | None) -> Path:
    """The base. Raises OutputError when deltas of this model could not be saved as an adapter, whatever they learn."""
    if base is None:
        raise OutputError("an adapter is saved as an addition to a base model on disk; save the base model first.")
    if model.attached:
        sites = ", ".join(key.replace("/", ".") for key in model.attached)
        raise OutputError(
            f"modules are attached to this model ({sites}), and an adapter has no place for them. Detach them "
            f"(bildung.detach), or train all parameters (tune full, align dpo --full)."
        )
    return base


def write(model: Any, directory: Path, base: Path | None) -> None:
    """Write every low-rank delta of `model` as one PEFT LoRA adapter on `base`.

    Raises OutputError when a delta is switched off or not low-rank, or the base has no place of its own on disk.
    """
    base = check_place(model, base)
    found = {name: _joined(name, linear) for name, linear in linears(model).items() if linear.deltas}
    matrices, tensors = targets(model), {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, members in matrices.items():
        here = {name: found[name] for name in members if name in found}
        if not here:
            continue
        scalings = {scaling for _, _, scaling in here.values()}
        # An adapter has one alpha / rank, so where the scalings differ each B takes its own along.
        scaling = scalings.pop() if len(scalings) == 1 else 1.0
        factors = {name: (A, B if own == scaling else B * own) for name, (A, B, own) in here.items()}
        lora_A, lora_B = together(factors, members, {name: linears(model)[name].out_features for name in members})
        ranks[target] = len(lora_A)
        alphas[target] = scaling * len(lora_A)
        tensors[f"{PREFIX}{target}.lora_A.weight"] = lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{target}.lora_B.weight"] = lora_B.detach().cpu().contiguous()
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": TASKS.get(model.config.kind),
        "base_model_name_or_path": os.path.abspath(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(delta.dropout for linear in linears(model).values() for delta in _low_rank(linear)),
        "bias": "none",
        "fan_in_fan_out": is_transposed(model),
        "target_modules": _shortest_names(list(ranks), list(matrices)),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if not math.isclose(a, alpha)},
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_file(tensors, directory / TENSORS)


def _low_rank(linear: Linear) -> list[LowRank]:
    return [delta for delta in linear.deltas.values() if isinstance(delta, LowRank)]


def _joined(name: str, linear: Linear) -> tuple[Tensor, Tensor, float]:
    """(A, B, scaling) of all deltas of one matrix; a single one stays as trained. Raises OutputError."""
    low_rank = _low_rank(linear)
    if len(low_rank) < len(linear.deltas) or not all(delta.enabled for delta in low_rank):
        raise OutputError(f"{name} carries a delta that is switched off or has no low-rank form; delete it first.")
    if len(low_rank) == 1:
        return low_rank[0].lora_A, low_rank[0].lora_B, low_rank[0].scaling
    lora_B = torch.cat([delta.lora_B * delta.scaling for delta in low_rank], dim=1)
    return torch.cat([delta.lora_A for delta in low_rank]), lora_B, 1.0


def _shortest_names(chosen: list[str], all_names: list[str]) -> list[str]:
    """["q_proj", "v_proj"] when exactly the matrices of these kinds were chosen, else the full paths."""
    kinds = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    same = [name for name in all_names if name.rsplit(".", 1)[-1] in kinds]
    return kinds if sorted(same) == sorted(chosen) else chosen

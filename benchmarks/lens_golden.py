"""What TransformerLens says of a small model, as tests/golden/transformer_lens.json; a test compares with it.

    python -m benchmarks.lens_golden PEERS          PEERS: where it was installed, see benchmarks/taps.py

Attribution patching by its hooks as in Nanda's demo: on the corrupted run, (clean - corrupted) * gradient of the logit
difference, summed over rows; activation patching by its own `transformer_lens.patching`; its cached activations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.taps import lens_model
from tests.golden.transformer_lens import model_by_rule, pairs_by_rule

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.probs": "attn.hook_pattern",
    "attn.z": "attn.hook_z",
    "attn.out": "hook_attn_out",
    "mlp.out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


def main(peers: str) -> None:
    """Write the file."""
    sys.path.append(peers)
    from transformer_lens import patching

    model = model_by_rule()
    peer = lens_model(model)
    pairs = pairs_by_rule()
    clean_BL, corrupted_BL = (
        torch.tensor([getattr(row, side) for row in pairs.rows]) for side in ("clean", "corrupted")
    )
    right, wrong = pairs.rows[0].answers[0], pairs.rows[0].wrong[0]

    def metric(logits_BLV: Tensor) -> Tensor:
        return (logits_BLV[:, -1, right] - logits_BLV[:, -1, wrong]).mean()

    layers = range(peer.cfg.n_layers)
    with torch.no_grad():
        _, clean = peer.run_with_cache(clean_BL)
    gradients: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        gradients[hook.name] = gradient.detach().clone()

    names = {f"blocks.{n}.{hook}" for n in layers for hook in HOOKS.values()}
    corrupted: dict[str, Tensor] = {}
    with peer.hooks(
        fwd_hooks=[(lambda name: name in names, lambda x, hook: corrupted.__setitem__(hook.name, x.detach()))],
        bwd_hooks=[(lambda name: name in names, keep)],
    ):
        start = metric(peer(corrupted_BL))
        start.backward()
    golden: dict[str, Any] = {"clean": metric(peer(clean_BL)).item(), "corrupted": start.item()}
    golden["attribution"], golden["activations"] = {}, {}
    for word, hook in HOOKS.items():
        rows = []
        for n in layers:
            name = f"blocks.{n}.{hook}"
            share = (clean[name] - corrupted[name]) * gradients[name]
            by = (0, 1, 3) if hook.startswith("attn.") and word != "attn.probs" else (0, 2, 3)
            rows.append(share.sum((0, 2) if share.ndim == 3 else by).tolist())
        golden["attribution"][word] = rows  # layers x places (streams) or heads
        golden["activations"][word] = [clean[f"blocks.{n}.{hook}"][0].flatten()[:40].tolist() for n in layers]
    with torch.no_grad():
        golden["patching"] = {
            "resid_pre": patching.get_act_patch_resid_pre(peer, corrupted_BL, clean, metric).tolist(),
            "attn.out": patching.get_act_patch_attn_out(peer, corrupted_BL, clean, metric).tolist(),
            "mlp.out": patching.get_act_patch_mlp_out(peer, corrupted_BL, clean, metric).tolist(),
            "attn.z": patching.get_act_patch_attn_head_out_all_pos(peer, corrupted_BL, clean, metric).tolist(),
            "attn.q": patching.get_act_patch_attn_head_q_all_pos(peer, corrupted_BL, clean, metric).tolist(),
            "attn.probs": patching.get_act_patch_attn_head_pattern_all_pos(peer, corrupted_BL, clean, metric).tolist(),
        }
    text = json.dumps(golden, default=float)
    Path("tests/golden/transformer_lens.json").write_text(text.replace("], [", "],\n[") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

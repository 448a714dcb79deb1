"""What a low-rank correction gives back of what NF4 takes, before any training: held-out loss by the way it is chosen.

python -m benchmarks.reconstruction MODEL_DIRECTORY [--rank 64] [--data nursery:alpaca]

nf4       no correction
svd       the correction of that rank nearest to the error of the weights
loftq     five rounds of rounding what the last correction left and correcting anew (Li et al. 2023)
qera      nearest in what the matrix puts out, for inputs like those of 64 other rows (tune/qera.py)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import bildung
from bildung.data.batches import chat_examples, pad
from bildung.data.text import conversations
from bildung.model.linear import record_weights
from bildung.model.nf4 import Nf4
from bildung.train.fit import mean_loss
from bildung.train.objectives import clm
from bildung.tune.qera import Moments, reconstruction

ROWS, LENGTH, ROUNDS = 48, 256, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--data", default="nursery:alpaca")
    given = parser.parse_args()
    lm = bildung.load(given.model, torch.float32)
    examples = list(chat_examples(lm.tokenizer, conversations(given.data, limit=600), LENGTH))
    held_out, read = (
        [pad(rows[start : start + 8], lm.tokenizer.pad_id) for start in range(0, len(rows), 8)]
        for rows in (examples[:ROWS], examples[100:164])
    )
    linears = {name: one for name, one in lm.model.linears().items() if name != "lm_head"}
    moments = Moments(list(linears))
    with record_weights(lm.model, tuple(linears), moments):
        for batch in read:
            moments.keep_BL = batch.keep_BL
            mean_loss(lm.model, clm, [batch])
    weights = {name: one.base.dense().detach().clone() for name, one in linears.items()}

    def measured() -> float:
        return mean_loss(lm.model, clm, held_out)["loss"]

    dense = measured()
    print(f"dense  {dense:.4f}", flush=True)
    for way in ("nf4", "svd", "loftq", "qera"):
        for name, one in linears.items():
            moment_II = moments.sum_II[name] / moments.count[name]
            with torch.no_grad():
                one.base.weight.copy_(corrected(weights[name], moment_II, way, given.rank))
        loss = measured()
        print(f"{way:6} {loss:.4f}  {loss / dense - 1:+.1%}", flush=True)


def corrected(weight_OI: Tensor, moment_II: Tensor, way: str, rank: int) -> Tensor:
    """W rounded to NF4, with its correction."""
    rounded_OI = Nf4.quantize(weight_OI).dense()
    if way == "nf4":
        return rounded_OI
    if way == "qera":
        lora_A, lora_B = reconstruction(weight_OI - rounded_OI, moment_II, rank)
        return rounded_OI + lora_B @ lora_A
    change_OI = nearest(weight_OI - rounded_OI, rank)
    for _ in range(ROUNDS - 1 if way == "loftq" else 0):
        rounded_OI = Nf4.quantize(weight_OI - change_OI).dense()
        change_OI = nearest(weight_OI - rounded_OI, rank)
    return rounded_OI + change_OI


def nearest(matrix_OI: Tensor, rank: int) -> Tensor:
    """The matrix of that rank with the least distance."""
    u_OR, s_R, v_RI = torch.linalg.svd(matrix_OI, full_matrices=False)
    return (u_OR[:, :rank] * s_R[:rank]) @ v_RI[:rank]


if __name__ == "__main__":
    main()

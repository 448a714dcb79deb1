"""The weight seam by hand: add a low-rank delta to every query matrix, switch it off, merge it, save it.

python examples/04_add_a_delta.py lives/smollm2/base /tmp/with-delta
"""

import sys
from pathlib import Path

import torch

import bildung
from bildung.model.linear import match_linears
from bildung.model.low_rank import LowRank

source, out = Path(sys.argv[1]), Path(sys.argv[2])
lm = bildung.load(source, dtype="float32")
tokens_BL = torch.tensor([lm.tokenizer.encode("The capital of France is")])
with torch.no_grad():
    plain = lm.model(tokens_BL)
    for linear in match_linears(lm.model, "q_proj").values():
        delta = LowRank(linear.in_features, linear.out_features, rank=4, scaling=1.0)
        torch.nn.init.normal_(delta.lora_B, std=0.05)
        linear.deltas["mine"] = delta
    print("with the delta the logits move by", (lm.model(tokens_BL) - plain).abs().max().item())
    with bildung.deltas_off(lm.model, "mine"):
        print("switched off they move by", (lm.model(tokens_BL) - plain).abs().max().item())
first = next(iter(match_linears(lm.model, "q_proj").values()))
difference = first.weight().detach() - first.base.dense().detach()
print("rank of the change:", torch.linalg.matrix_rank(difference).item())
bildung.save(lm, out)
print("saved as a PEFT adapter:", sorted(path.name for path in out.iterdir()))

"""Read any activation by name: how long is the residual stream's vector after each layer?

python examples/02_read_activations.py lives/smollm2/base
"""

import sys

import torch

import bildung

lm = bildung.load(sys.argv[1], dtype="float32")
for site, shape in list(bildung.sites(lm.model).items())[:13]:
    print(f"{site:24} {shape}")

tokens_BL = torch.tensor([lm.tokenizer.encode("The capital of France is")])
with torch.no_grad(), bildung.observe(lm.model, "layers.*.resid_post") as seen:
    lm.model(tokens_BL)
for site, resid_BLD in seen.items():
    print(f"{site:24} mean length {resid_BLD.norm(dim=-1).mean():8.2f}")

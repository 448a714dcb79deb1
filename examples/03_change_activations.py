"""Switch off one layer's feed-forward at a time: how much does the prediction change (KL divergence, nats)?

python examples/03_change_activations.py lives/smollm2/base
"""

import sys

import torch
import torch.nn.functional as F

import bildung

lm = bildung.load(sys.argv[1], dtype="float32")
tokens_BL = torch.tensor([lm.tokenizer.encode("The capital of France is")])
with torch.no_grad():
    whole_V = F.log_softmax(lm.model(tokens_BL)[0, -1], dim=-1)
    for layer in range(lm.config.num_hidden_layers):
        with bildung.intervene(lm.model, {f"layers.{layer}.mlp.out": torch.zeros_like}):
            ablated_V = F.log_softmax(lm.model(tokens_BL)[0, -1], dim=-1)
        kl = F.kl_div(ablated_V, whole_V, log_target=True, reduction="sum").item()
        print(f"layer {layer:2}  {kl:7.3f}  {'#' * min(60, round(10 * kl))}")

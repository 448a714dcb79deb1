"""The logit lens: which token would each layer say?

python examples/08_logit_lens.py lives/smollm2/base
"""

import sys

import bildung
from bildung.look.lenses.lens import logit_lens

lm = bildung.load(sys.argv[1], dtype="float32")
lens = logit_lens(lm, "The capital of France is")
print("what follows", *lens.labels)
for layer, (ids_K, probs_K) in enumerate(zip(lens.top_ids_NLK[:, -1], lens.top_probs_NLK[:, -1], strict=True)):
    words = "  ".join(f"{lens.words[int(i)]} {p:.2f}" for i, p in zip(ids_K[:3], probs_K[:3], strict=True))
    print(f"layer {layer:2}  KL to the end {lens.kl_NL[layer, -1]:6.2f} nats   {words}")

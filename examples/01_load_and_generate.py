"""Load a model directory and let it continue a text.

python examples/01_load_and_generate.py lives/smollm2/base
"""

import sys

import bildung

lm = bildung.load(sys.argv[1])
print(f"{lm.config.model_type}: {sum(p.numel() for p in lm.model.parameters()):,} parameters")
print(bildung.generate(lm, "The sea is", new_tokens=24))
print(bildung.generate(lm, "The sea is", new_tokens=24, temperature=0.8, top_p=0.9, seed=1))

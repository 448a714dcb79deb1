"""The logit lens: which token would each layer say?

python examples/08_logit_lens.py lives/smollm2/base
"""

import sys

import bildung
from bildung.look.lens import logit_lens

lm = bildung.load(sys.argv[1], dtype="float32")
print(logit_lens(lm, "The capital of France is"))

"""Instruction tuning as an operation: a model directory in, an adapter directory with its record out.

python examples/05_tune_lora.py lives/smollm2/base /tmp/tuned
"""

import sys
from pathlib import Path

from bildung.tune.lora import Settings, lora

source, out = Path(sys.argv[1]), Path(sys.argv[2])
record = lora(source, out, Settings(data="mini:chat", rank=4, steps=4, max_length=128, held_out=4, evaluate_every=2))
print(f"{record.operation}: {record.trained_tokens} tokens trained in {record.seconds:.1f} s")
for name, value in record.measured.items():
    print(f"  {name}: {value}")

again = lora(source, out, Settings(data="mini:chat", rank=4, steps=4, max_length=128, held_out=4, evaluate_every=2))
print("asked again, nothing is done:", again.started == record.started)

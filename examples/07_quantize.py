"""Quantize a model to 8 and to 4 bits and see what that costs it.

python examples/07_quantize.py lives/smollm2/base /tmp/quantized
"""

import sys
from pathlib import Path

from bildung.compress.quantize import Settings, quantize

source, out = Path(sys.argv[1]), Path(sys.argv[2])
for method in ("int8", "nf4"):
    record = quantize(source, out / method, Settings(method=method, compare_texts=2))
    print(method)
    for name, value in record.measured.items():
        print(f"  {name}: {value}")

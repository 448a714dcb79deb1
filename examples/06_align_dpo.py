"""Direct preference optimization; the reference model is the same model with the new delta switched off.

python examples/06_align_dpo.py lives/smollm2/base /tmp/aligned
"""

import json
import sys
from pathlib import Path

from bildung.align.dpo import Settings, dpo

source, out = Path(sys.argv[1]), Path(sys.argv[2])
dpo(source, out, Settings(data="mini:preferences", rank=4, steps=4, max_length=128))
for line in (out / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    print({name: round(row[name], 4) for name in ("step", "loss", "margin", "accuracy") if name in row})

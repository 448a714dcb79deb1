"""A run for test_fit.py to kill, which says the number of each batch it asks for."""

from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import save_file

from bildung.data.batches import Batch, Example, pad
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import adamw

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def main(out: Path, says: Connection) -> None:
    torch.set_num_threads(1)
    model = build(from_dict({"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 64, **SIZES}))

    def batch_at(n: int) -> Batch:
        says.send(n)
        tokens = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(n)).tolist()
        return pad([Example(tokens, [False] + [True] * 11)], pad_id=0)

    fit(model, batch_at, clm, adamw(model, 1e-2), steps=12, out=out, checkpoint_every=2)
    save_file({name: p.detach() for name, p in model.named_parameters()}, out / "model.safetensors")

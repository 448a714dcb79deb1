"""Tokens per second of greedy decoding, against transformers' generate(), on one model in one run.

    python benchmarks/decode.py MODEL_DIRECTORY [--dtype bfloat16] [--rounds 3] [--threads 2]

One prompt of 32 tokens, 128 new ones, no stop token. Both sides run eagerly, as a plain call does; reading the prompt
and packing the matrices (model/packed.py) count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file, its folder is on the path and the folder above is not
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Figures, ratio, take_turns, timed

CONTENDERS = ("bildung", "transformers")
PROMPT_TOKENS, NEW_TOKENS = 32, 128
TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part."
)


def main() -> None:
    """Print the figures of every round, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.model, given.dtype, given.threads, given.repeats)))
        return
    arguments = [given.model, "--dtype", given.dtype, "--threads", str(given.threads), "--repeats", str(given.repeats)]
    rounds = take_turns(__file__, CONTENDERS, given.rounds, arguments)
    speed, slowest, fastest = ratio(rounds, "transformers", "bildung", "seconds")
    processor, *_ = ratio(rounds, "transformers", "bildung", "processor_seconds")
    memory, *_ = ratio(rounds, "bildung", "transformers", "peak_mb")
    same = sum(a == b for a, b in zip(*(rounds[0][name]["tokens"] for name in CONTENDERS), strict=True))
    print(
        f"bildung / transformers, {given.dtype}: {speed:.2f} x tokens per second ({slowest:.2f}..{fastest:.2f}), "
        f"{processor:.2f} x per processor second, {memory:.2f} x peak memory; {same} of {NEW_TOKENS} tokens equal"
    )
    figures = {"benchmark": "decode", "dtype": given.dtype, "threads": given.threads, "rounds": given.rounds}
    ratios = {"speed": speed, "speed_range": [slowest, fastest], "processor": processor, "memory": memory}
    print(json.dumps({**figures, **ratios, "equal_tokens": same}))


def measure(contender: str, path: str, dtype: str, threads: int, repeats: int) -> Figures:
    """Tokens per second of one contender, and the tokens."""
    import torch

    torch.set_num_threads(threads)
    made: list[int] = []
    work = bildung_work(path, dtype, made) if contender == "bildung" else transformers_work(path, dtype, made)
    figures = timed(work, repeats)
    return {"tokens_per_second": NEW_TOKENS / figures["seconds"], **figures, "tokens": made}


def bildung_work(path: str, dtype: str, made: list[int]):  # type: ignore[no-untyped-def]
    """One call of our decoding loop; leaves the new tokens in `made`."""
    import bildung
    from bildung.run.loop import decode

    lm = bildung.load(path, dtype)
    prompt = lm.tokenizer.encode(TEXT)[:PROMPT_TOKENS]

    def work() -> None:
        made[:] = decode(lm.model, [prompt], new_tokens=NEW_TOKENS)[0].tokens

    return work


def transformers_work(path: str, dtype: str, made: list[int]):  # type: ignore[no-untyped-def]
    """One call of generate(); leaves the new tokens in `made`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # as many tokens as ours
    encoded = AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt")
    inputs = {name: encoded[name][:, :PROMPT_TOKENS] for name in ("input_ids", "attention_mask")}

    def work() -> None:
        made[:] = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, PROMPT_TOKENS:].tolist()

    return work


if __name__ == "__main__":
    main()

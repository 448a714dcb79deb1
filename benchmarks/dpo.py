"""DPO on real preference pairs: pairs per second and peak memory, against trl's DPOTrainer, on one model in one run.

    python benchmarks/dpo.py MODEL_DIRECTORY [--data nursery:dpo] [--rounds 2] [--steps 3] [--contenders ...]

LoRA rank 16 on all seven kinds of matrices, 4 pairs a step, at most 512 tokens a sequence, the same pairs in the same
order. Each measurement is a process of its own, and the contenders take turns (A B C A B C), so that a slow minute of
the machine hits all of them. The first step of each process warms up and is not counted. The reference's forward pass
is counted wherever it happens: this is one pass over the data, in which scoring each pair once saves nothing yet.

The peers: float32 weights under bfloat16 autocast, trl's usual way, and everything in bfloat16, its leanest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

CONTENDERS = ("bildung", "trl, autocast", "trl, bf16 weights")
PAIRS, LENGTH, RANK, ALPHA = 4, 512, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="nursery:dpo")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="1: processor time is then exact on a busy machine")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.model, given.data, given.steps, given.threads)))
        return
    found: dict[str, list[dict[str, float]]] = {contender: [] for contender in given.contenders}
    for number in range(given.rounds):
        for contender in given.contenders:
            load = os.getloadavg()[0]
            command = [sys.executable, __file__, given.model, "--data", given.data, "--steps", str(given.steps)]
            output = subprocess.run(
                [*command, "--one", contender], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            made = json.loads(output.splitlines()[-1])
            found[contender].append(made)
            print(
                f"round {number + 1}  {contender:18} {made['pairs_per_second']:6.3f} pairs/s  "
                f"{made['processor_seconds_per_pair']:6.1f} processor s/pair  "
                f"{made['tokens_per_second']:6.0f} tokens/s  peak {made['peak_mb']:6.0f} MB  "
                f"first loss {made['first_loss']:.6f}  load {load:.1f}",
                flush=True,
            )
    ours = found["bildung"]
    for contender in given.contenders[1:]:
        both = list(zip(ours, found[contender], strict=True))
        speed = [a["pairs_per_second"] / b["pairs_per_second"] for a, b in both]
        work = [b["processor_seconds_per_pair"] / a["processor_seconds_per_pair"] for a, b in both]
        memory = [a["peak_mb"] / b["peak_mb"] for a, b in both]
        print(
            f"bildung / {contender}: {statistics.median(speed):.2f} x pairs per second "
            f"({min(speed):.2f}..{max(speed):.2f}), {statistics.median(work):.2f} x pairs per processor second, "
            f"{statistics.median(memory):.2f} x peak memory"
        )


def measure(contender: str, model: str, data: str, steps: int, threads: int) -> dict[str, float]:
    """Pairs and real tokens per second of all steps after the first, and the peak memory of this process."""
    import torch

    torch.set_num_threads(threads)
    pairs, tokens = usable_pairs(model, data, (steps + 1) * PAIRS)
    run = bildung_run if contender == "bildung" else trl_run
    seconds, processor_seconds, first_loss = run(model, pairs, steps, contender)
    counted = steps * PAIRS
    return {
        "pairs_per_second": counted / seconds,
        "processor_seconds_per_pair": processor_seconds / counted,
        "tokens_per_second": sum(tokens[PAIRS:]) / seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_loss": first_loss,
    }


class Clock:
    """Wall and processor seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def start(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.steps.append((time.perf_counter() - self.began[0], time.process_time() - self.began[1]))

    def after_first(self) -> tuple[float, float]:
        """Both, summed over the steps after the first."""
        return sum(wall for wall, _ in self.steps[1:]), sum(processor for _, processor in self.steps[1:])


def usable_pairs(model: str, data: str, count: int) -> tuple[list, list[int]]:
    """The first `count` pairs with a target left on both sides, and the tokens of each pair, without padding."""
    from bildung.core.errors import DataError
    from bildung.data.batches import pair_examples
    from bildung.data.pairs import preference_pairs
    from bildung.tokens.tokenizer import Tokenizer

    tokenizer, pairs, tokens = Tokenizer.load(model), [], []
    for pair in preference_pairs(data):
        try:
            (example,) = pair_examples(tokenizer, [pair], LENGTH)
        except DataError:
            continue
        pairs.append(pair)
        tokens.append(len(example.chosen) + len(example.rejected))
        if len(pairs) == count:
            return pairs, tokens
    raise SystemExit(f"{data} has {len(pairs)} usable pairs of {count}")


def bildung_run(path: str, pairs: list, steps: int, contender: str) -> tuple[float, float, float]:
    import torch

    import bildung
    from bildung.align.dpo import DELTA, dpo_objective
    from bildung.align.preference import Pairs, remembered, without_delta
    from bildung.data.batches import pair_examples
    from bildung.train.fit import fit
    from bildung.train.optim import adamw
    from bildung.tune.lora import Settings, add_lora

    lm = bildung.load(path, "bfloat16")
    lm.model.compute_dtype = torch.bfloat16
    add_lora(lm.model, Settings(data="none", rank=RANK, alpha=ALPHA), DELTA)
    batches = Pairs(pair_examples(lm.tokenizer, pairs, LENGTH), lm.tokenizer.pad_id)
    optimizer, clock, losses = adamw(lm.model, 1e-4), Clock(), []
    for step, numbers in enumerate(batches.in_order(PAIRS)):
        clock.start()
        batches.remember(lm.model, without_delta(DELTA), [numbers])
        answers = batches(numbers)
        objective = dpo_objective(remembered)
        history = fit(lm.model, lambda n, a=answers: a, objective, optimizer, steps=1, clip=1.0, seed=step)
        losses.append(history.rows[-1]["loss"])
        clock.stop()
    return *clock.after_first(), losses[0]


def trl_run(path: str, pairs: list, steps: int, contender: str) -> tuple[float, float, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = Clock()

    class Timed(TrainerCallback):
        def on_step_begin(self, *given, **more) -> None:
            clock.start()

        def on_step_end(self, *given, **more) -> None:
            clock.stop()

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = [dict(prompt=pair.prompt, chosen=answer(pair.chosen), rejected=answer(pair.rejected)) for pair in pairs]
    autocast = contender == "trl, autocast"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32 if autocast else torch.bfloat16),
            args=DPOConfig(
                output_dir=scratch,
                per_device_train_batch_size=PAIRS,
                max_steps=steps + 1,
                max_length=LENGTH,
                bf16=autocast,
                learning_rate=1e-4,
                gradient_checkpointing=False,
                train_sampling_strategy="sequential",
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=False,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(path),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"),
            callbacks=[Timed()],
        )
        trainer.train()
        first_loss = float(trainer.state.log_history[0]["loss"])
    return *clock.after_first(), first_loss


if __name__ == "__main__":
    main()

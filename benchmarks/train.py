"""Training speed and peak memory against transformers, peft and trl: one model, the same data and settings, one run.

    python benchmarks/train.py MODEL_DIRECTORY [--tasks full lora instructions] [--rounds 2] [--steps 3]
    python benchmarks/train.py MODEL_DIRECTORY --length 4096 --steps 10       # on a GPU, if there is one

full           every parameter             4 rows of 512 tokens of real text, no padding, every token a target
lora           rank 16, alpha 32, on all   the same
               seven kinds of matrices
instructions   the same LoRA               answers of instruction data are the targets; rows of at most 512 tokens, 4 a
                                           step; packed, and one conversation a row. Only real tokens are counted

All: bfloat16 activations, AdamW (fused, learning rate 1e-4, no decay), gradients clipped at 1, no dropout, no
checkpointing of activations, all cores, or the GPU. A directory that holds no weights, only config.json and a
tokenizer, stands for random ones. On a GPU `full` and `lora` are also run compiled, `full` in 8 bits too, and the
memory is the GPU's. The peers' ways:

    transformers          Trainer, float32 weights under bfloat16 autocast, its way; ours has float32 masters too
    peft                  Trainer, the base in float32 under autocast
    peft, bf16 base       Trainer, the base in bfloat16, its leanest
    trl                   SFTTrainer as it comes (float32 under autocast, padded), packing=False
    trl, packed           SFTTrainer with packing=True (best-fit, padding-free)

Each measurement is a process of its own, and the contenders take turns (A B C A B C), so that a slow minute of the
machine hits all of them. The first three steps of each process warm up, while memory is fetched for the first time, and
are not counted. MFU: 2 operations per multiply-add of the forward pass, as many again for the gradients of the inputs
and of the weights that train, divided by the speed of one large bfloat16 matrix product, measured in the same run (the
fastest of all rounds). Of FP8 too: by that of bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Figures, ratio, take_turns

RANK, ALPHA, RATE = 16, 32, 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTENDERS = {
    "full": ("full: bildung", "full: transformers"),
    "lora": ("lora: bildung", "lora: peft", "lora: peft, bf16 base"),
    "instructions": (
        "instructions: bildung, packed",
        "instructions: bildung",
        "instructions: trl, packed",
        "instructions: trl",
    ),
}
ON_A_GPU = {
    "full": ("full: bildung, compiled", "full: bildung, compiled fp8", "full: transformers, compiled"),
    "lora": ("lora: bildung, compiled",),
}
CEILING = "ceiling"
WARM_UP = 3  # steps that are not counted
STEPS_UNPACKED = 3  # times as many steps where a step has a third of the tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--data", default="nursery:alpaca", help="conversations for `instructions`")
    parser.add_argument("--text", default="nursery:moby-dick", help="prose for `full` and `lora`")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--material", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        material = Path(folder) / "material.json"
        material.write_text(json.dumps(prepare(given)))
        arguments = [given.model, "--material", str(material)]
        for name in ("steps", "threads", "rows", "length"):
            arguments += [f"--{name}", str(getattr(given, name))]
        contenders = {
            task: (*CONTENDERS[task], *(ON_A_GPU.get(task, ()) if on_a_gpu() else ())) for task in given.tasks
        }
        rounds = take_turns(__file__, [CEILING, *sum(contenders.values(), ())], given.rounds, arguments)
    report(rounds, contenders)


def on_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def report(rounds: list[dict[str, Figures]], contenders: dict[str, tuple[str, ...]]) -> None:
    """Ratios per round, and how much of the ceiling each contender reaches."""
    ceiling = max(made[CEILING]["flops"] for made in rounds)
    print(f"\nceiling: {ceiling / 1e9:.0f} GFLOP/s (bfloat16 matrix product, fastest of {len(rounds)} rounds)")
    for task, names in contenders.items():
        for name in names:
            speed = statistics.median(made[name]["tokens_per_second"] for made in rounds)
            flops = rounds[0][f"{task}: bildung"]["flops_per_token"]
            peak = statistics.median(made[name]["peak_mb"] for made in rounds)
            print(f"{name:32} {speed:7.0f} tokens/s  MFU {speed * flops / ceiling:4.0%}  peak {peak:6.0f} MB")
    print()
    for names in contenders.values():
        ours = [name for name in names if "bildung" in name]
        for name in ours:
            for peer in (name for name in names if "bildung" not in name):
                if any(peer.endswith(word) and word not in name for word in ("packed", "compiled")):
                    continue
                median, least, most = ratio(rounds, peer, name, "seconds_per_token")
                memory = 1 / ratio(rounds, peer, name, "peak_mb")[0]
                print(
                    f"{name} / {peer.partition(': ')[2]}: {median:.2f} x tokens per second ({least:.2f}..{most:.2f}), "
                    f"{memory:.2f} x peak memory"
                )


def prepare(given: argparse.Namespace) -> dict[str, Any]:
    """The same rows and conversations for everybody."""
    from bildung.core.errors import DataError
    from bildung.data.batches import chat_examples
    from bildung.data.text import conversations, documents
    from bildung.tokens.tokenizer import Tokenizer

    tokenizer, needed = Tokenizer.load(given.model), (given.steps + WARM_UP) * given.rows * given.length
    tokens: list[int] = []
    for text in documents(given.text):
        tokens += tokenizer.encode(text[:200_000])
        if len(tokens) >= needed:
            break
    rows = [tokens[start : start + given.length] for start in range(0, needed, given.length)]
    if len(rows[-1]) < given.length:
        raise SystemExit(f"{given.text} has {len(tokens)} tokens of {needed}")
    chats, lengths = [], []
    if "instructions" in given.tasks:
        most = needed + 4 * given.length
        for chat in conversations(given.data, limit=4000):
            try:
                (example,) = chat_examples(tokenizer, [chat], 10**6)
            except DataError:
                continue
            if len(example) <= given.length and len(chat) == 2:
                chats.append(chat)
                lengths.append(len(example))
            if sum(lengths) >= most and len(chats) >= (STEPS_UNPACKED * given.steps + WARM_UP) * given.rows:
                break
    return {"rows": rows, "chats": chats, "lengths": lengths}


def measure(given: argparse.Namespace) -> Figures:
    """What one contender does, in this process: the steps after the warm-up."""
    import torch

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.one == CEILING:
        return {"flops": product_speed(), "load": round(os.getloadavg()[0], 1)}
    material = json.loads(Path(given.material).read_text())
    task, _, who = given.one.partition(": ")
    run = bildung_run if who.startswith("bildung") else peer_run
    seconds, tokens, more = run(given, task, who, material)
    return {
        "tokens_per_second": sum(tokens[WARM_UP:]) / sum(seconds[WARM_UP:]),
        "seconds_per_token": sum(seconds[WARM_UP:]) / sum(tokens[WARM_UP:]),
        "peak_mb": peak_bytes() / 2**20,
        **more,
        "load": round(os.getloadavg()[0], 1),
    }


def peak_bytes() -> int:
    import torch

    if on_a_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def product_speed() -> float:
    """Operations per second of a bfloat16 product of two square matrices, the fastest of ten."""
    import torch

    size, device = (8192, "cuda") if on_a_gpu() else (2048, "cpu")
    a = torch.randn(size, size, device=device).bfloat16()
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, a)
        if on_a_gpu():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[2:])


def model_of(path: str, dtype: str) -> Any:
    """A LanguageModel; with random weights, made where they are to be, if the directory has none."""
    import torch

    import bildung
    from bildung.core import ranks
    from bildung.model.build import make
    from bildung.model.config import read_config
    from bildung.tokens.tokenizer import Tokenizer

    if any(Path(path).glob("*.safetensors")):
        return bildung.load(path, dtype)
    config = read_config(Path(path))
    with ranks.device():
        model = make(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
    model.tie()
    return bildung.LanguageModel(model, Tokenizer.load(path), config)


def bildung_run(
    given: argparse.Namespace, task: str, who: str, material: dict[str, Any]
) -> tuple[list[float], list[int], Figures]:
    import torch

    from bildung.data.batches import Example, chat_examples, pack, pad, pad_packed
    from bildung.model.fp8 import use_fp8
    from bildung.train.compiled import compile_layers
    from bildung.train.fit import fit
    from bildung.train.objectives import clm
    from bildung.train.optim import adamw
    from bildung.train.utilisation import flops_per_token
    from bildung.tune.lora import Settings, add_lora

    steps = given.steps
    lm = model_of(given.model, "float32" if task == "full" else "bfloat16")
    lm.model.compute_dtype = torch.bfloat16
    if task == "full":
        lm.model.requires_grad_(True)
    else:
        add_lora(lm.model, Settings(data="none", rank=RANK, alpha=ALPHA))
    if "fp8" in who:
        use_fp8(lm.model)
    if "compiled" in who:
        compile_layers(lm.model)
    packed, length = who.endswith("packed"), given.length
    if task == "instructions":
        examples = chat_examples(lm.tokenizer, material["chats"], given.length)
        length = round(statistics.mean(material["lengths"]))
        steps *= 1 if packed else STEPS_UNPACKED
    else:
        examples = [Example(row, [False] + [True] * (given.length - 1)) for row in material["rows"]]
    rows = pack(examples, given.length) if packed else [[example] for example in examples]

    def batch_at(number: int) -> Any:
        chosen = rows[number * given.rows : (number + 1) * given.rows]
        pad_id = lm.tokenizer.pad_id
        return pad_packed(chosen, pad_id) if packed else pad([row[0] for row in chosen], pad_id)

    history = fit(lm.model, batch_at, clm, adamw(lm.model, RATE), steps=steps + WARM_UP, clip=1.0)
    tokens = [row["tokens"] for row in history.rows]
    seconds = [row["tokens"] / row["tokens_per_second"] for row in history.rows]
    more = {"flops_per_token": flops_per_token(lm.model, length), "first_loss": history.rows[0]["loss"]}
    return seconds, tokens, more


def peer_run(
    given: argparse.Namespace, task: str, who: str, material: dict[str, Any]
) -> tuple[list[float], list[int], Figures]:
    import datasets
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    seconds: list[float] = []
    tokens: list[int] = []

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **more: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **more: Any) -> None:
            if on_a_gpu():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    bf16_base = who.endswith("bf16 base")
    path, steps = given.model, given.steps
    dtype = torch.bfloat16 if bf16_base else torch.float32
    if any(Path(path).glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    else:
        with torch.device("cuda" if on_a_gpu() else "cpu"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(path)
    packed = who.endswith("packed")
    if task == "instructions" and not packed:
        steps *= STEPS_UNPACKED
    with tempfile.TemporaryDirectory() as scratch:
        common: dict[str, Any] = dict(
            output_dir=scratch,
            per_device_train_batch_size=given.rows,
            max_steps=steps + WARM_UP,
            bf16=not bf16_base,
            learning_rate=RATE,
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            use_cpu=not on_a_gpu(),
            torch_compile=who.endswith("compiled"),
            dataloader_pin_memory=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer: Any
        if task == "instructions":
            rows = [{"prompt": chat[:1], "completion": chat[1:]} for chat in material["chats"]]
            trainer = SFTTrainer(
                model,
                args=SFTConfig(**common, max_length=given.length, packing=packed),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=config,
                callbacks=[Timed()],
            )
        else:
            trainer = Trainer(
                model if task == "full" else get_peft_model(model, config),
                args=TrainingArguments(**common),
                train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in material["rows"]]),
                processing_class=tokenizer,
                callbacks=[Timed()],
            )
        compute_loss = trainer.compute_loss

        def counting(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return compute_loss(model, inputs, *rest, **more)

        trainer.compute_loss = counting
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return seconds, tokens, {"first_loss": float(losses[0])}


if __name__ == "__main__":
    main()
